"""The commit that a number names, with git and without."""

import io
import pathlib
import subprocess
import tarfile

import pytest

from maskrl_jax.evaluate import provenance

ROOT = pathlib.Path(__file__).parents[2]


def test_commit_outside_a_repository_is_that_of_the_archive_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "STAMP", tmp_path / "commit.txt")
    assert provenance.commit_hash(tmp_path / "nowhere") == "unknown"
    provenance.STAMP.write_text(f"{'0123456789' * 4}\n")
    assert provenance.commit_hash(tmp_path / "nowhere") == "012345678901"


def test_an_archive_inside_another_repository_keeps_its_commit_until_it_is_tracked(tmp_path, monkeypatch):
    def git(*arguments):
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
        return subprocess.run(["git", *own, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "STAMP", tmp_path / "commit.txt")
    provenance.STAMP.write_text("0123456789" * 4)
    git("init")
    git("commit", "--allow-empty", "--message=other")
    assert provenance.commit_hash(tmp_path) == "012345678901"
    git("add", ".")
    git("commit", "--message=all")
    assert provenance.commit_hash(tmp_path) == git("rev-parse", "--short=12", "HEAD")


def test_git_puts_the_commit_into_an_archive():
    def git(*arguments):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
        return done.stdout if done.returncode == 0 else pytest.skip("no git repository")

    head = git("rev-parse", "HEAD").strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD", "maskrl_jax/commit.txt"))) as archive:
        assert archive.extractfile("maskrl_jax/commit.txt").read().strip() == head
