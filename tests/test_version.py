"""Version of the package: that of the git tag in a checkout, in an archive, in a wheel and in a source distribution."""

import os
import shutil
import subprocess
import sys

import pytest
from packaging.version import Version
from shared import ROOT, load_script

from matquant import version as matquant_version
from matquant.errors import UserError
from matquant.stages import job
from matquant.version import UNKNOWN, from_description


def version_in(folder):
    """Version that the module says in a checkout at a folder."""
    return load_script(folder / "matquant" / "version.py", "copied_version").version()


def git(folder, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    run = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def copy(folder):
    """Copy of the files that say the version, without a repository."""
    (folder / "matquant").mkdir(parents=True)
    shutil.copy(ROOT / "matquant" / "version.py", folder / "matquant")
    shutil.copy(ROOT / ".gitattributes", folder)
    return folder


@pytest.fixture
def checkout(tmp_path):
    folder = copy(tmp_path / "checkout")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def archive(checkout, folder):
    folder.mkdir()
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=checkout, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, check=True, input=packed)
    return folder


@pytest.mark.parametrize(
    ("description", "version"),
    [
        ("v1.2.0-0-g0123abcde", "1.2.0"),
        ("v1.2.0", "1.2.0"),
        ("v1.2.0-0-g0123abcde-dirty", "1.2.0+dirty"),
        ("v1.2.0rc1-14-g0123abcde", "1.2.0rc1+14.g0123abcde"),
        ("v1.2.0-14-g0123abcde-dirty", "1.2.0+14.g0123abcde.dirty"),
        ("0123abcde", "0+g0123abcde"),
        ("0123abcde-dirty", "0+g0123abcde.dirty"),
        ("", UNKNOWN),
        ("release-7", UNKNOWN),
    ],
)
def test_versions_of_descriptions(description, version):
    assert from_description(description) == version
    assert str(Version(version)) == version  # in the normal form, which pip and wheels do not change


def test_later_commits_are_newer():
    assert Version(from_description("v1.2.0-9-gabc")) < Version(from_description("v1.2.0-10-gabc")) < Version("1.2.1")


@pytest.mark.parametrize("place", ["checkout", "archive"])
def test_the_version_is_that_of_the_tag(place, checkout, tmp_path):
    def version():
        if place == "checkout":
            return version_in(checkout)
        return version_in(archive(checkout, tmp_path / f"archive-{git(checkout, 'rev-parse', 'HEAD')}"))

    git(checkout, "tag", "not-a-release")
    git(checkout, "commit", "--allow-empty", "-m", "second")
    assert version() == f"0+g{git(checkout, 'rev-parse', '--short=9' if place == 'checkout' else '--short', 'HEAD')}"
    git(checkout, "commit", "--allow-empty", "-m", "third")
    git(checkout, "tag", "v3.1.0")
    assert version() == "3.1.0"
    git(checkout, "commit", "--allow-empty", "-m", "fourth")
    assert version() == f"3.1.0+1.g{git(checkout, 'rev-parse', '--short=9', 'HEAD')}"


def test_changed_files_are_said(checkout):
    git(checkout, "tag", "v3.1.0")
    (checkout / ".gitattributes").write_text("matquant/version.py export-subst\n# changed\n")
    assert version_in(checkout) == "3.1.0+dirty"


def test_a_copy_without_a_repository_has_no_version(tmp_path, checkout, monkeypatch):
    assert version_in(copy(tmp_path / "copy")) == UNKNOWN
    assert version_in(copy(checkout / "vendored")) == UNKNOWN  # the repository around it is another project's
    monkeypatch.setenv("PATH", "")
    assert version_in(checkout) == UNKNOWN


@pytest.mark.slow
def test_the_command_line_runs_in_a_copy_without_a_repository(tmp_path):
    for name in ("matquant", "conf", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", tmp_path)
    program = "import matquant; print(matquant.__version__, matquant.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert run.stdout.split() == [UNKNOWN, str(tmp_path / "matquant" / "__init__.py")]
    run = subprocess.run([sys.executable, "run.py", "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_job_names_the_commit_that_it_began_with(matquant, small_model, tmp_path, monkeypatch):
    calls = []

    def described() -> str:
        calls.append(1)
        return f"{len(calls):040x}"

    def load(*_: object) -> None:
        assert calls == [1]
        raise UserError("after the version was read")

    monkeypatch.setattr(matquant_version, "_described", described)
    monkeypatch.setattr(job, "load_job", load)
    matquant_version.version.cache_clear()
    try:
        _, _, err = matquant(f"model.path={small_model}")
        assert "after the version was read" in err
        assert matquant_version.version() == f"0+g{1:040x}"
    finally:
        matquant_version.version.cache_clear()
