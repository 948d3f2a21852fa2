"""Pushing: the files that are sent, those that are refused, and the requests that a server with the Hub's endpoints gets."""

import base64
import hashlib
import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from builders import image_bytes
from conftest import REPOSITORY
from evaluations import SCENES, write_evaluation
from huggingface_hub import constants
from PIL import Image
from runs import ENVIRONMENT, ON_CPU
from safetensors.torch import load_file, save_file
from stand_ins import make_processor, tiny_model

from training import push
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.push import PushedFile, check_contents, find_model, list_files
from training.support.files import write_text

REPO = "someone/zebra-finder"
SPACE = "someone/zebra-space"
TOKEN = "hf_" + "a1B2" * 8
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """The Hub's endpoints that pushing calls, on a port of this machine; remembers what it receives.

    Attributes:
        requests: Method and path of every request, in order.
        created: Bodies of the requests to create a repository.
        files: Committed files, by path.
        space_files: Files committed to the Space, by path.
        space_variables: Of the Space.
        commits: Number of commits, the Space's too.
        tags: Tags and the commits that they name.
        private: Whether the repository is; `None` before it exists.
        failures: Status to answer with, by the beginning of a path.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Hub)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[str] = []
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.space_files: dict[str, bytes] = {}
        self.space_variables: dict[str, str] = {}
        self.commits = 0
        self.tags: dict[str, str] = {}
        self.private: bool | None = None
        self.failures: dict[str, int] = {}


class _Hub(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer()

    do_POST = do_PUT = do_GET

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self):
        path, body = self.path.partition("?")[0], self.body()
        self.server.requests.append(f"{self.command} {path}")
        failure = next((status for start, status in self.server.failures.items() if path.startswith(start)), None)
        if failure:
            return self.reply({"error": "as the test wants it"}, failure)
        if path.startswith("/stored/"):  # large files go to another store, which needs no token
            self.server.blobs[path.removeprefix("/stored/")] = body
            return self.reply({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        for name, handle in self.ROUTES.items():
            if re.fullmatch(name, f"{self.command} {path}"):
                return handle(self, body)
        return self.reply({"error": f"no such endpoint: {path}"}, 404)

    def reply(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def create(self, body: bytes) -> None:
        self.server.created.append(json.loads(body))
        if json.loads(body).get("type") == "space":
            return self.reply({"url": f"{self.server.url}/spaces/{SPACE}"})
        url = {"url": f"{self.server.url}/{REPO}"}
        if self.server.private is not None:
            return self.reply(url | {"error": "You already created this model repo"}, 409)
        self.server.private = json.loads(body).get("visibility") == "private"
        return self.reply(url)

    def information(self, body: bytes) -> None:
        self.reply(
            {"id": REPO, "private": self.server.private, "sha": COMMIT, "siblings": [], "tags": [], "downloads": 0}
        )

    def references(self, body: bytes) -> None:
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in self.server.tags.items()]
        self.reply({"branches": [], "converts": [], "tags": tags})

    def validate(self, body: bytes) -> None:
        sent = json.loads(body)
        metadata = yaml.safe_load(sent["content"].split("---\n")[1])
        assert metadata["pipeline_tag"] if sent["repoType"] == "model" else metadata["sdk"] == "gradio"
        self.reply({"warnings": [], "errors": []})

    def preupload(self, body: bytes) -> None:
        files = json.loads(body)["files"]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
        self.reply(
            {"files": [{"path": f["path"], "uploadMode": f["uploadMode"], "shouldIgnore": False} for f in files]}
        )

    def batch(self, body: bytes) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.url}/stored/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def variable(self, body: bytes) -> None:
        assert not self.server.space_files  # they would start the Space
        sent = json.loads(body)
        self.server.space_variables[sent["key"]] = sent["value"]
        self.reply({sent["key"]: {"value": sent["value"], "updatedAt": "2026-01-01T00:00:00.000Z"}})

    def space_information(self, body: bytes) -> None:
        self.reply({"id": SPACE, "private": False, "sha": COMMIT, "siblings": [], "tags": []})

    def commit(self, body: bytes) -> None:
        files = self.server.space_files if self.path.startswith("/api/spaces/") else self.server.files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits += 1
        self.reply({"commitUrl": f"{self.server.url}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})

    def tag(self, body: bytes) -> None:
        self.server.tags[json.loads(body)["tag"]] = self.path.rpartition("/")[2]
        self.reply({})

    ROUTES = {
        "POST /api/repos/create": create,
        f"GET /api/models/{REPO}": information,
        f"GET /api/models/{REPO}/refs": references,
        "POST /api/validate-yaml": validate,
        f"POST /api/models/{REPO}/preupload/main": preupload,
        f"POST /{REPO}.git/info/lfs/objects/batch": batch,
        f"POST /api/models/{REPO}/commit/main": commit,
        f"POST /api/models/{REPO}/tag/{COMMIT}": tag,
        f"GET /api/spaces/{SPACE}": space_information,
        f"POST /api/spaces/{SPACE}/variables": variable,
        f"POST /api/spaces/{SPACE}/preupload/main": preupload,
        f"POST /api/spaces/{SPACE}/commit/main": commit,
    }


@pytest.fixture
def server():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server, monkeypatch) -> HubServer:
    """The server, which this process uses as the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run as training writes it, with other files beside the model that must not be published."""
    run = tmp_path_factory.mktemp("outputs") / "trial"
    tiny_model().save_pretrained(run / "model")
    make_processor().save_pretrained(run / "model")
    data = DataSettings(source="scenes", num_scenes=(4, 2, 3), scene_size=64)
    write_text(run / "settings.yaml", dump_settings(TrainingSettings(output_dir=str(run), data=data)))
    for name in ("optimizer.bin", "pytorch_model.bin", "random_states_0.pkl", "training_args.pt", "evil_sera.py"):
        (run / "model" / name).write_bytes(b"planted")
    for name in (".token", "notes.txt", "checkpoint/optimizer.bin", ".cache/huggingface/token"):
        write_text(run / "model" / name, f"{TOKEN} {Path.home()}")
    return run


@pytest.fixture(scope="module")
def staged(run_folder, tmp_path_factory) -> Path:
    """The staged files of the run. A test of a real push below checks that they answer by themselves."""
    target = tmp_path_factory.mktemp("staged") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(push, "check_answer", lambda folder: None)
        push.stage(run_folder / "model", REPO, target, evaluations=[], examples=[])
    return target


@pytest.fixture
def already_staged(staged, monkeypatch):
    """Commands use files that are staged already, to save time."""

    def copy(model_folder, repo_id, target, **options):
        shutil.copytree(staged, target)
        return list_files(target)

    monkeypatch.setattr(push, "stage", copy)


def refusal(arguments: list[str]) -> str:
    """The message of a command that fails."""
    with pytest.raises((ValueError, OSError)) as error:
        push.main(arguments)
    return str(error.value)


def listed(output: str) -> list[PushedFile]:
    rows = [line.split(maxsplit=2) for line in output.splitlines()]
    return [PushedFile(path, int(size), digest) for digest, size, path in rows]


def test_a_dry_run_lists_byte_for_byte_what_a_push_sends(run_folder, hub, monkeypatch, capsys, tmp_path):
    command = [str(run_folder), REPO, "--revision-tag", "v1"]
    with monkeypatch.context() as patch:
        patch.setattr(push, "check_answer", lambda folder: None)  # the push below calls it
        patch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("it used the network"))
        push.main([*command, "--dry-run", "--output", str(tmp_path / "kept")])
    would = listed(capsys.readouterr().out)
    assert hub.requests == []
    assert list_files(tmp_path / "kept") == would

    environment = ENVIRONMENT | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "training" / "push.py"), *command],
        env=environment | ON_CPU,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert listed(done.stdout) == would
    sent = [PushedFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(hub.files.items())]
    assert sent == sorted(would)
    assert hub.commits == 1 and hub.tags == {"v1": COMMIT} and hub.private is False
    assert hub.created == [{"name": "zebra-finder", "organization": "someone"}]
    assert TOKEN not in done.stdout + done.stderr and f"{hub.url}/{REPO}/commit/{COMMIT}, tagged v1" in done.stderr


def test_only_the_model_and_its_code_are_sent(staged, run_folder):
    paths = {file.path for file in list_files(staged)}
    code = {
        path.name for name in ("modeling_sera", "processing_sera") for path in (REPOSITORY / name).glob("*_sera.py")
    }
    shown, bare = ({f"examples/{i}{kind}.png" for i in (1, 2, 3)} for kind in ("", "-image"))
    examples = shown | bare | {"examples/examples.json"}
    model = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert paths == code | examples | model | {"README.md", "LICENSE", "handler.py", "requirements.txt"}
    secrets = (TOKEN.encode(), b"planted", str(run_folder).encode(), str(Path.home()).encode() + b"/")
    for path in paths:
        assert not any(secret in (staged / path).read_bytes() for secret in secrets), path
    for path in shown | bare:
        with Image.open(staged / path) as image:
            assert image.size == (64, 64) and not image.info
    widget = yaml.safe_load((staged / "README.md").read_text().split("---\n")[1])["widget"]
    assert {example["output"]["url"] for example in widget} == shown and all(example["text"] for example in widget)
    asked = json.loads((staged / "examples" / "examples.json").read_text())
    assert {f"examples/{example['image']}" for example in asked} == bare
    assert [example["text"] for example in asked] == [[example["text"]] for example in widget]


def test_the_weights_are_those_of_the_model(staged, run_folder):
    before, after = (type(tiny_model()).from_pretrained(folder) for folder in (run_folder / "model", staged))
    assert all(a.equal(b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


def test_examples_are_drawn_from_pixels_alone(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "check_answer", lambda folder: None)
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "at home", 6
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(image_bytes("JPEG", exif=exif))
    target = tmp_path / "staged"
    push.stage(run_folder / "model", REPO, target, evaluations=[], examples=[(str(photo), "left zebra")])
    for name in ("1.png", "1-image.png"):
        assert b"at home" not in (target / "examples" / name).read_bytes()
        with Image.open(target / "examples" / name) as image:
            assert image.size == (40, 60)
    assert (
        not (target / "examples" / "2.png").exists()
        and "publisher of the model chose" in (target / "README.md").read_text()
    )


def test_figures_on_a_data_set_of_the_hub_have_a_file_of_their_own(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "check_answer", lambda folder: None)
    monkeypatch.setattr(push, "read_evaluation", lambda path, models: json.loads(path.read_text()))
    paths = [
        write_evaluation(tmp_path / f"{i}.json", data, "val")
        for i, data in enumerate((DataSettings(root="refer"), SCENES))
    ]
    record = json.loads(paths[0].read_text())
    record["counts"]["objects"] = 3811  # RefCOCO's
    paths[0].write_text(json.dumps(record))
    files = push.stage(run_folder / "model", REPO, tmp_path / "staged", evaluations=paths, examples=[])
    (sent,) = (file.path for file in files if file.path.startswith(".eval_results/"))
    (entry,) = yaml.safe_load((tmp_path / "staged" / sent).read_text())
    assert entry["dataset"] == {"id": "jxu124/refcoco", "task_id": "val_mIoU"}
    index = yaml.safe_load((tmp_path / "staged" / "README.md").read_text().split("---\n")[1])["model-index"]
    types = [result["dataset"]["type"] for result in index[0]["results"]]
    assert types == ["refcoco", "embedded-scenes"]  # the card has both


def test_a_second_push_to_the_same_place(hub, already_staged, run_folder):
    push.main([str(run_folder), REPO, "--private"])
    assert hub.private and hub.created[0]["visibility"] == "private" and hub.tags == {}
    first = dict(hub.files)
    push.main([str(run_folder / "model"), REPO, "--private", "--revision-tag", "v2"])
    assert hub.files == first and hub.commits == 2 and hub.tags == {"v2": COMMIT}


def test_a_space_is_told_the_model_before_it_starts(hub, already_staged, run_folder, capsys):
    command = [str(run_folder), REPO, "--space", SPACE]
    push.main([*command, "--dry-run"])
    would = listed(capsys.readouterr().out)
    assert hub.requests == []
    push.main(command)
    assert listed(capsys.readouterr().out) == would and hub.commits == 2
    assert hub.space_variables == {"SERA_MODEL": REPO}
    assert [(body.get("type"), body.get("sdk")) for body in hub.created][1:] == [("space", "gradio")]
    place = f"spaces/{SPACE}/"
    sent = {(place + path, len(data), hashlib.sha256(data).hexdigest()) for path, data in hub.space_files.items()}
    assert sent == {file for file in would if file.path.startswith(place)} and len(hub.files) == len(would) - len(sent)
    metadata = yaml.safe_load(hub.space_files["README.md"].decode().split("---\n")[1])
    assert metadata["models"] == [REPO] and metadata["app_file"] in hub.space_files
    assert b"user/" not in hub.space_files["README.md"]


def test_a_space_that_is_refused_is_named(hub, already_staged, run_folder):
    hub.failures = {f"/api/spaces/{SPACE}/variables": 403}
    assert f"may not write to {SPACE} (403)" in refusal([str(run_folder), REPO, "--space", SPACE])
    hub.private = True
    with pytest.raises(ValueError, match="someone/zebra-space exists and is public"):
        push.main([str(run_folder), REPO, "--private", "--space", SPACE])
    assert hub.space_files == {}
    assert "cannot be a repository on the Hub" in refusal([str(run_folder), REPO, "--space", "zebra", "--dry-run"])
    assert "exists already" in refusal([str(run_folder), REPO, "--output", str(run_folder), "--dry-run"])


def test_nothing_is_sent_to_a_public_repository_that_should_be_private(hub, already_staged, run_folder):
    hub.private = False
    with pytest.raises(ValueError, match="someone/zebra-finder exists and is public"):
        push.main([str(run_folder), REPO, "--private"])
    assert hub.files == {} and hub.blobs == {}


def test_nothing_is_sent_for_a_tag_that_exists(hub, already_staged, run_folder):
    hub.private, hub.tags = False, {"v1": "f" * 40}
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        push.main([str(run_folder), REPO, "--revision-tag", "v1"])
    assert hub.files == {} and hub.blobs == {} and hub.tags == {"v1": "f" * 40}


@pytest.mark.parametrize(
    "path, status, message",
    [
        ("/api/repos/create", 500, r"refused someone/zebra-finder \(500\)"),
        ("/api/repos/create", 403, r"may not write to someone/zebra-finder \(403\)"),
        ("/api/models/someone/zebra-finder/commit", 500, r"\(500\).*as the test wants it"),
        ("/stored/", 403, r"may not write to someone/zebra-finder \(403\)"),
        ("/api/models/someone/zebra-finder/tag", 404, r"\(404\)"),
    ],
)
def test_a_server_that_refuses(hub, already_staged, run_folder, path, status, message):
    hub.failures = {path: status} | ({"/api/models/": 404} if status == 403 and "create" in path else {})
    said = refusal([str(run_folder), REPO, "--revision-tag", "v1"])
    assert re.search(message, said) and TOKEN not in said and said.count("\n") == 0
    assert path.endswith("/tag") or hub.commits == 0


def test_a_token_that_is_not_accepted(hub, already_staged, run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refusal([str(run_folder), REPO])
    assert "does not accept the token (401)" in said and "hf_wrong" not in said


def test_a_server_that_is_not_there(hub, already_staged, run_folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "cannot be reached at http://127.0.0.1" in refusal([str(run_folder), REPO])


def test_without_a_token_nothing_begins(hub, run_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(push, "stage", lambda *arguments, **options: pytest.fail("it began"))
    assert "There is no token" in refusal([str(run_folder), REPO])
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["zebra-finder", "a/b/c", "someone/", "some one/zebra", "someone/a--b", "../x", ""])
def test_bad_names_of_repositories(run_folder, repo_id):
    said = refusal([str(run_folder), repo_id, "--dry-run"])
    assert repr(repo_id) in said and "cannot be a repository on the Hub" in said


@pytest.mark.parametrize("tag", ["", "v 1", "../v1", "refs/tags/v1"])
def test_bad_tags(run_folder, tag):
    said = refusal([str(run_folder), REPO, "--dry-run", f"--revision-tag={tag}"])
    assert f"--revision-tag {tag!r}" in said


def test_folders_without_a_model(tmp_path, run_folder):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json, and no model/config\.json"):
        find_model(tmp_path)
    for content, message in (
        ("{", "not a model's configuration"),
        ("[]", "not a model's"),
        ('{"model_type": "clip"}', "'clip'"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path)
    assert find_model(run_folder) == find_model(run_folder / "model") == run_folder / "model"


@pytest.mark.parametrize(
    "damage", ["cut off", "no weights", "pickled weights", "lacks a weight", "no processor", "no vocabulary"]
)
def test_a_model_that_is_not_whole_is_refused_before_anything_is_sent(run_folder, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    weights = folder / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
        (folder / "pytorch_model.bin").unlink()
    elif damage == "pickled weights":
        weights.unlink()
        torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    elif damage == "lacks a weight":
        state = load_file(weights)
        state.pop(sorted(state)[0])
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "no processor":
        (folder / "processor_config.json").unlink()
    else:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError) as error:
        push.load_whole(folder)
    assert "holds no whole model" in str(error.value) and "\n" not in str(error.value)


def planted(tmp_path: Path, name: str, content: str) -> None:
    """Check a folder that holds one file."""
    write_text(tmp_path / "staged" / name, content)
    check_contents(tmp_path / "staged", list_files(tmp_path / "staged"), tmp_path / "outputs" / "trial" / "model")


@pytest.mark.parametrize(
    "path",
    [
        Path.home() / "data",
        Path.cwd() / "x.py",
        Path(tempfile.gettempdir()) / "y",
        Path("/home/ada/refer"),
        Path("/Users/ada/refer"),
        "file:///home/ada",
        "C:\\Users\\ada\\refer",
        Path(sys.prefix),
    ],
)
def test_a_path_of_a_machine_is_refused_and_its_file_named(tmp_path, path):
    with pytest.raises(ValueError, match=r"^config\.json holds a path of this machine"):
        planted(tmp_path, "config.json", json.dumps({"vision_model": f"{path}"}))


def test_a_path_of_the_models_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^README\.md holds a path of this machine"):
        planted(tmp_path, "README.md", f"trained in {tmp_path / 'outputs' / 'trial' / 'model'}.")


@pytest.mark.parametrize("token", [TOKEN, "a-token-of-another-form"])
def test_a_token_is_refused_and_its_file_is_named_without_it(tmp_path, token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"^tokenizer_config\.json holds text that looks like a token") as error:
        planted(tmp_path, "tokenizer_config.json", json.dumps({"auth": token}))
    assert token not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        "model.pt",
        "state.pkl",
        "evil_sera.py",
        "model.safetensors.bak",
        ".env",
        "examples/a.png",
        "x/config.json",
    ],
)
def test_only_known_files_are_sent(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} is not one of the files that may be sent"):
        planted(tmp_path, name, "")


def test_ordinary_text_is_not_taken_for_a_secret(tmp_path):
    text = f"https://huggingface.co/home/x and/or{Path.home()} hf_hub_download C:/x ~/data {Path.home()}-like /homes"
    planted(tmp_path, "README.md", text)
    planted(tmp_path, "model-00001-of-00002.safetensors", "")


def test_a_secret_in_the_models_own_files_is_not_sent(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "check_answer", lambda folder: None)
    for i, secret in enumerate((TOKEN, f"{Path.home()}/towers/vit")):
        folder = shutil.copytree(run_folder / "model", tmp_path / f"model{i}")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"origin": secret}))
        with pytest.raises(ValueError, match=r"^tokenizer_config\.json holds"):
            push.stage(folder, REPO, tmp_path / f"staged{i}", evaluations=[], examples=[])


def test_code_that_does_not_stand_alone_is_noticed(staged, tmp_path):
    partial = shutil.copytree(staged, tmp_path / "partial")
    (partial / "decoder_sera.py").unlink()
    with pytest.raises(ValueError, match=r"does not answer by itself.*decoder_sera"):
        push.check_answer(partial)


def test_an_evaluation_that_is_missing_is_named_before_any_work(run_folder, monkeypatch):
    monkeypatch.setattr(push, "load_whole", lambda folder: pytest.fail("it began"))
    options = ["--evaluation", str(run_folder / "evaluation-test.json"), "--dry-run"]
    assert "evaluation-test.json" in refusal([str(run_folder), REPO, *options])


def test_an_evaluation_of_other_weights_is_refused(run_folder, tmp_path):
    path = write_evaluation(tmp_path / "evaluation-test.json")
    write_text(path, json.dumps(json.loads(path.read_text()) | {"weights": "0123"}))
    with pytest.raises(ValueError, match="other weights than"):
        push.stage(run_folder / "model", REPO, tmp_path / "model", evaluations=[path], examples=[])


def test_the_script_fails_with_a_message_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["push.py", str(tmp_path), REPO, "--dry-run"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(REPOSITORY / "training" / "push.py"), run_name="__main__")
    assert str(error.value.code).startswith("error: ") and "\n" not in error.value.code
