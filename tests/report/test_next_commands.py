"""Commands that a job suggests at its end."""

import pytest

from matquant.report import JobResults
from matquant.report.next_commands import next_commands

COMMAND = "python run.py model.path=x 'bits=[2,3]'"


def commands(make_results, **changes):
    return [command for _, command in next_commands(JobResults.from_json(make_results(command=COMMAND, **changes)))]


def test_a_job_suggests_what_it_has_not_done(make_results):
    assert commands(make_results) == [
        f"{COMMAND} pack=nested",
        f"{COMMAND} search.average_bits=3",
        f"{COMMAND} refine=scales",
    ]
    done = {"search": {"front": []}, "refine": {"bits": [2], "steps": 1}}
    assert commands(make_results, **done) == [f"{COMMAND} pack=nested"]


def test_a_packed_folder_is_served_whatever_its_name(make_results):
    pack = {"format": "nested", "folder": "/runs/a b"}
    assert commands(make_results, pack=pack) == ["matquant serve '/runs/a b'"]
    assert commands(make_results, pack=pack | {"format": "gptq"}) == []


@pytest.mark.parametrize(
    "changes", [{"failure": {"stage": "pack", "error": "x"}}, {"parent": {"models": {"2": {"bytes": 1}}}}], ids=str
)
def test_failed_jobs_and_several_models_have_no_next_command(make_results, changes):
    assert commands(make_results, **changes) == []
