import json
import subprocess

from matquant.report.provenance import provenance


def test_provenance_names_commit_command_versions_machine_and_date():
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"commit", "dirty", "command", "versions", "machine", "date"}
    assert found["versions"].keys() >= {"python", "torch", "transformers"}
    assert found["machine"]["cores"] > 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_provenance_without_git_says_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance()
    assert (found["commit"], found["dirty"]) == (None, None)
