"""Offline runs of Weights & Biases, read back from their files."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as pb


def records(path):
    """The records of an offline run: LevelDB's log format, 32 KiB blocks, around protocol buffers."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, pending = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0 and length == 0:
            return
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = pb.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def items(update):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def read_run(folder: Path):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = {"history": [], "summary": {}, "config": {}, "metrics": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run["history"].append(items(record.history.item))
        elif kind == "environment":
            run["cores"] = record.environment.cpu_count_logical or run.get("cores", 0)
            run["commit"] = record.environment.git.commit or run.get("commit")
        elif kind == "summary":
            run["summary"] |= items(record.summary.update)
        elif kind == "metric":
            run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "run":
            run["config"] |= items(record.run.config.update)
            run |= {"group": record.run.run_group, "name": record.run.display_name, "tags": list(record.run.tags)}
            run |= {"project": record.run.project, "id": record.run.run_id}
    return run
