from __future__ import annotations

import traceback

import huggingface_hub
import pytest
from huggingface_hub import constants

import merge_kit as mk
from merge_kit.publish import push as module
from tests.publish.hub_server import serving

# The Hub's client calls its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_canary0123456789"
FILES = {
    "README.md": b"---\ntags: [merge]\n---\nmerged\n",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"\x01" * 5000,
    "model-00002-of-00002.safetensors": b"\x02" * 5000,
    "empty.txt": b"",
    "vae/config.json": b"{}\n",
}


@pytest.fixture
def hub(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "merged"
    for name, content in FILES.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def told(error: BaseException) -> str:
    """Return all that a user or a log would see of an error."""
    return "".join(traceback.format_exception(error)) + str(error)


def test_every_file_arrives_in_one_commit(hub, folder):
    page = mk.push(folder, "me/merged", token=TOKEN)
    assert page == f"{hub.url}/me/merged"
    assert hub.files == FILES
    (commit,) = hub.commits
    assert commit["summary"] == "Upload merged"
    assert hub.repos["me/merged"].get("visibility") != "private"


def test_hidden_files_and_links_stay_here(hub, folder, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / ".env").write_text("secret")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("secret")
    mk.push(folder, "me/merged", token=TOKEN)
    assert hub.files == FILES


def test_a_second_push_sends_nothing_twice(hub, folder):
    mk.push(folder, "me/merged", token=TOKEN)
    sent = len([path for method, path in hub.requests if method == "PUT"])
    assert sent == 2
    mk.push(folder, "me/merged", token=TOKEN)
    assert len(hub.commits) == 1
    (folder / "config.json").write_bytes(b'{"a": 1}')
    mk.push(folder, "me/merged", token=TOKEN, message="Fix the config")
    assert hub.commits[1]["summary"] == "Fix the config"
    assert hub.commits[1]["files"] == ["config.json"]
    assert len([path for method, path in hub.requests if method == "PUT"]) == sent


def test_a_revision_and_a_pull_request_have_pages_of_their_own(hub, folder):
    assert (
        mk.push(folder, "me/merged", revision="v2", token=TOKEN) == f"{hub.url}/me/merged/tree/v2"
    )
    assert ("POST", "/api/models/me/merged/commit/v2") in hub.requests
    (folder / "config.json").write_bytes(b"{ }")
    page = mk.push(folder, "me/merged", create_pr=True, token=TOKEN)
    assert page == f"{hub.url}/me/merged/discussions/1"


def test_a_repository_can_be_private(hub, folder):
    mk.push(folder, "me/merged", private=True, token=TOKEN)
    assert hub.repos["me/merged"]["visibility"] == "private"


@pytest.mark.parametrize(
    ("part", "status", "hint"),
    [
        ("/api/", 401, "hf auth login"),
        ("/commit/", 403, "permission"),
        ("/preupload/", 404, "are repository and revision there"),
        ("/commit/", 412, "has changed meanwhile"),
        ("/commit/", 503, "push again"),
        ("/storage/", 403, "permission"),
        ("validate-yaml", 400, "valid metadata"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_hint(hub, folder, part, status, hint):
    hub.faults[part], hub.said = status, f"no\nfor {TOKEN}"
    with pytest.raises(mk.HubError) as caught:
        mk.push(folder, "me/merged", token=TOKEN)
    error = caught.value
    assert error.code() == 5
    assert error.where == "me/merged"
    assert str(status) in error.problem
    assert "\n" not in error.problem
    assert hint in error.hint
    assert TOKEN not in told(error)
    assert hub.commits == []
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(
        name.rpartition("/")[2] for name in FILES
    )


def test_the_words_of_the_hub_are_shown_without_the_token(hub, folder):
    hub.faults["/commit/"], hub.said = 403, f"{TOKEN} may not write here"
    with pytest.raises(mk.HubError, match="403: <token> may not write here") as caught:
        mk.push(folder, "me/merged", token=TOKEN)
    assert TOKEN not in told(caught.value)


def test_a_failed_push_goes_on_where_it_was(hub, folder):
    hub.faults["/commit/"] = 503
    with pytest.raises(mk.HubError, match="the Hub answered 503"):
        mk.push(folder, "me/merged", token=TOKEN)
    hub.faults.clear()
    mk.push(folder, "me/merged", token=TOKEN)
    assert hub.files == FILES
    assert len([path for method, path in hub.requests if method == "PUT"]) == 2


def test_a_silent_hub_is_not_waited_for(hub, folder, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    hub.faults["repos/create"] = 1.5
    with pytest.raises(mk.HubError, match="the Hub did not answer in time"):
        mk.push(folder, "me/merged", token=TOKEN)
    assert huggingface_hub.get_session().timeout.read is None  # as it was before


def test_no_hub_at_all_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(mk.HubError, match="cannot push: ") as caught:
        mk.push(folder, "me/merged", token=TOKEN)
    assert "check the connection" in caught.value.hint
    assert "\n" not in caught.value.problem


def test_a_repository_without_a_valid_name_is_refused(hub, folder):
    with pytest.raises(mk.HubError) as caught:
        mk.push(folder, "me/a/b", token=TOKEN)
    assert caught.value.hint == "name the repository as user/name"
    assert hub.requests == []


def test_what_is_no_finished_merge_is_refused_before_the_hub_is_asked(hub, folder, tmp_path):
    (folder / ".merge_kit").mkdir()
    with pytest.raises(mk.CheckpointError, match="is an unfinished merge"):
        mk.push(folder, "me/merged", token=TOKEN)
    (tmp_path / "none").mkdir()
    with pytest.raises(mk.CheckpointError, match="holds no files"):
        mk.push(tmp_path / "none", "me/merged", token=TOKEN)
    with pytest.raises(mk.CheckpointError, match="cannot read"):
        mk.push(tmp_path / "nothing", "me/merged", token=TOKEN)
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone(hub, folder):
    mk.push(folder, "me/merged", token=TOKEN)
    for (_, path), headers in zip(hub.requests, hub.headers, strict=True):
        found = headers.get("Authorization") or headers.get("authorization")
        assert (found is None) == path.startswith("/storage/")
