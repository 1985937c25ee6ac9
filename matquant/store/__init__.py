"""Content-addressed store: the output of each stage is a folder named after a hash of its inputs.

    <path>/<kind>/<key>/              finished artifact: manifest.json, safetensors and JSON files
    <path>/partial/<kind>-<key>/      draft: files of an unfinished build, reused by the next build of that key
    <path>/locks/<kind>-<key>.lock    held while that key is built; the operating system releases it if the process dies
    <path>/trash/                     folders that are being deleted

A folder gets its final name only when it is complete, and loses that name before its content is deleted.
"""

from matquant.store.artifact import Artifact, read_artifact
from matquant.store.config import StoreConfig
from matquant.store.draft import Draft
from matquant.store.files import DamageError, FileRecord, fingerprint_files, hash_file, write_atomically
from matquant.store.store import Store, StoreEntry

__all__ = [
    "Artifact",
    "DamageError",
    "Draft",
    "FileRecord",
    "Store",
    "StoreConfig",
    "StoreEntry",
    "fingerprint_files",
    "hash_file",
    "read_artifact",
    "write_atomically",
]
