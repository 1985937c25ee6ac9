"""The content-addressed store: each stage's output is a folder that is named after what determines its content.

    <path>/<kind>/<key>/              a finished artifact: manifest.json, safetensors and JSON files
    <path>/partial/<kind>-<key>/      a draft: files of an unfinished build, which the next one of that key takes up
    <path>/locks/<kind>-<key>.lock    held while that key is built; the system frees it when the holder dies
    <path>/trash/                     what is being deleted

A folder gets its final name only when it is whole, and loses that name before anything in it is deleted.
"""

from matquant.store.artifact import Artifact, Draft
from matquant.store.files import fingerprint_files
from matquant.store.store import Entry, Store

__all__ = ["Artifact", "Draft", "Entry", "Store", "fingerprint_files"]
