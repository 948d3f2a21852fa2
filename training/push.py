"""Publish a trained model on the Hub: `python training/push.py RUN user/name --evaluation RUN/evaluation-test.json`. (Ours.)

The command first stages the files in a temporary folder: weights and processor, the endpoint's handler, and the card. It saves
weights and processor anew, so other files in the model's folder are left out. The staged folder must answer a request without
our packages before anything is sent. Then it is sent as one commit. `--space user/name` also publishes a Space with the
model. `--dry-run` stops before the network.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from jsonargparse import ArgumentParser
from PIL import Image

import modeling_sera
import processing_sera
from processing_sera.image_processing_sera import to_rgb_image
from training.learning.building import load_whole
from training.learning.checkpoints import checksum
from training.publishing.card import TrainingRun, check_card, model_card, read_evaluation, read_run
from training.publishing.eval_results import FOLDER as RESULTS
from training.publishing.eval_results import eval_result_files
from training.scoring.overlay import overlay
from training.sources.images import open_image
from training.sources.scenes.dataset import generate_scenes
from training.support.commands import in_one_line, run_command
from training.support.files import partial_folder, replace_folder, sha256_of, write_binary, write_text, writing
from training.support.model_location import locate_model

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = {
    file.name
    for package in (modeling_sera, processing_sera)
    for file in Path(package.__file__).parent.glob("*_sera.py")
}
# all files that may be sent; any other file is refused, not skipped
FILES = CODE | {"config.json", "model.safetensors", "model.safetensors.index.json", "processor_config.json"}
FILES |= {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
FILES |= {
    "vocab.json",
    "merges.txt",
    "README.md",
    "LICENSE",
    "handler.py",
    "requirements.txt",
    "examples/examples.json",
}
NUMBERED = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|examples/\d+(-image)?\.png|" + re.escape(RESULTS) + r"/[\w.-]+\.yaml"
)
BINARY = {".safetensors", ".png"}
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
OTHER_HOME = re.compile(r"(?<![\w.~-])/(home|Users)/\w|\b[A-Z]:\\+Users\\")
NUM_SCENE_EXAMPLES = 3
SPACE = REPOSITORY / "hub" / "space"
SPACE_FILES = ("README.md", "app.py", "requirements.txt")
SPACE_MODEL = "user/sera-demo"  # placeholder for the model in the Space's README.md

# use the folder as an endpoint does, in a process that does not find our packages by PYTHONPATH or its working folder
ASK_THE_HANDLER = """
import base64, importlib.util, io, sys
from PIL import Image
spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
image = io.BytesIO()
Image.new("RGB", (60, 40), "gray").save(image, "PNG")
image = base64.b64encode(image.getvalue()).decode()
(answer,) = handler.EndpointHandler(sys.argv[1])({"inputs": {"image": image, "text": "the thing on the left"}})
assert set(answer) == {"label", "score", "mask"}
"""


class PushedFile(NamedTuple):
    """One file to send: its path in the repository, its size in bytes and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {self.size:>12}  {self.path}"


def find_model(folder: Path) -> Path:
    """The folder of the model itself: the one given, or `model/` in it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder holds no SERA.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = Path(locate_model(folder).source)
    config = found / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a model's configuration: {error}.") from error
    if kind != "sera":
        raise ValueError(f"{found} holds a model of type {kind!r}, not a SERA.")
    return found


def stage(
    model_folder: Path,
    repo_id: str,
    target: Path,
    *,
    evaluations: list[Path],
    examples: list[tuple[str, str]],
) -> list[PushedFile]:
    """Write the files to send into a new folder `target`, and check them.

    Args:
        model_folder: Folder that `save_pretrained` wrote.
        repo_id: "user/name".
        target: Folder to make.
        evaluations: Files for the card.
        examples: (image's path, expression) for the card's gallery. If empty, a model of scenes shows held-out scenes.

    Returns:
        The files, by path.

    Raises:
        ValueError, OSError: The model is not whole, or a file must not be published.
    """
    run = read_run(model_folder)
    name = repo_id.partition("/")[2]
    records = [read_evaluation(path, {locate_model(model_folder).name, repo_id, name}) for path in evaluations]
    images = [(to_rgb_image(open_image({"path": path, "bytes": None})), text) for path, text in examples]
    model, processor = load_whole(model_folder)
    weights = checksum(model.state_dict())
    for path, record in zip(evaluations, records, strict=True):
        if record.get("weights") not in (None, weights):  # older records lack it
            raise ValueError(f"{path} is an evaluation of other weights than those in {model_folder}; evaluate again.")

    model.save_pretrained(target)
    processor.save_pretrained(target)
    for file in ("LICENSE", "hub/handler.py", "hub/requirements.txt"):
        shutil.copyfile(REPOSITORY / file, target / Path(file).name)
    gallery, asked = [], []
    for i, (image, text) in enumerate(images or scene_examples(run), start=1):
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        with torch.inference_mode():
            (result,) = processor.post_process_referring_segmentation(model(**inputs), inputs)
        shown = overlay(
            image, [result["mask"].numpy()]
        )  # of the pixels alone: a photograph's place and date are not published
        path = f"examples/{i}.png"
        write_binary(target / path, lambda partial, shown=shown: shown.save(partial, format="png"))
        gallery.append((text, path))
        name = f"{i}-image.png"  # the Space offers it as an example
        write_binary(target / "examples" / name, lambda partial, bare=image: bare.save(partial, format="png"))
        asked.append({"image": name, "text": [text]})
    if asked:
        write_text(target / "examples" / "examples.json", json.dumps(asked, indent=1, ensure_ascii=False))
    text = model_card(
        repo_id,
        run=run,
        evaluations=records,
        examples=gallery,
        chosen=bool(images),
        predicts_presence=model.config.predict_presence,
        towers=(model.config.vision_family.name, model.config.text_family.name),
    )
    write_text(target / "README.md", text)
    for path, entries in eval_result_files(records).items():
        write_text(target / path, entries)

    check_card(text, target)
    files = list_files(target)
    check_contents(target, files, model_folder)
    check_answer(target)
    return files


def scene_examples(run: TrainingRun | None) -> list[tuple[Image.Image, str]]:
    """The first held-out scenes, each with the first expression about its first object. Empty for a model of other data."""
    if run is None or run.settings.data.source != "scenes":
        return []
    data, chosen = run.settings.data, {}
    number = min(NUM_SCENE_EXAMPLES, data.num_scenes[2])
    rows = generate_scenes(number, data.scene_seed, data.scene_size, split="test", scene_set=data.scene_set)
    for row in rows:
        chosen.setdefault(row["image_id"], (open_image(row["image"]), row["sentences"][0]))
    return list(chosen.values())


def list_files(folder: Path) -> list[PushedFile]:
    """Every file in a folder and its subfolders, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [PushedFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path)) for path in paths]


def check_contents(folder: Path, files: list[PushedFile], model_folder: Path) -> None:
    """Raise a `ValueError` with the file's name if a file is not in [`FILES`], or holds a token or a path of this machine."""
    places = {
        Path.home(),
        Path.cwd(),
        model_folder.absolute(),
        REPOSITORY,
        Path(tempfile.gettempdir()),
        Path(sys.prefix),
    }
    names = sorted({str(place) for place in places if len(place.parts) > 1})
    here = re.compile(r"(?<![\w.~-])(" + "|".join(map(re.escape, names)) + r")(?![\w.-])")
    token = get_token()
    for file in files:
        if file.path not in FILES and not NUMBERED.fullmatch(file.path):
            raise ValueError(f"{file.path} is not one of the files that may be sent.")
        if Path(file.path).suffix in BINARY:
            continue
        text = (folder / file.path).read_text(encoding="utf-8").replace("\\\\", "\\")  # as JSON writes backslashes
        if TOKEN.search(text) or (token and token in text):
            raise ValueError(f"{file.path} holds text that looks like a token; remove it from the model's folder.")
        if found := here.search(text) or OTHER_HOME.search(text):
            raise ValueError(
                f"{file.path} holds a path of this machine, {found[0]!r}; remove it from the model's folder."
            )


def check_answer(folder: Path) -> None:
    """Raise a `ValueError` if the staged folder does not answer an endpoint's request by itself."""
    with tempfile.TemporaryDirectory() as modules:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        command = [sys.executable, "-I", "-B", "-c", ASK_THE_HANDLER, str(folder)]
        done = subprocess.run(command, env=environment, cwd=modules, capture_output=True, text=True)
    if done.returncode:
        logger.debug(done.stderr)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"The staged model does not answer by itself: {reason}")


def upload(repo_id: str, folder: Path, files: list[PushedFile], *, private: bool, tag: str | None) -> str:
    """Send a staged folder as one commit, and tag the commit.

    `HfApi.upload_folder` may send several commits. Between two of them the repository would hold half a model.

    Args:
        repo_id: "user/name". The repository is made if it is absent.
        folder: The staged folder.
        files: The files in it that are sent.
        private: Whether the repository must be private.
        tag: Name of the new tag. `None`: no tag.

    Returns:
        The commit's URL.

    Raises:
        ValueError: The repository is public but must be private, or it has the tag already, or the Hub refuses the card.
        HfHubHTTPError, HTTPError, RuntimeError: The Hub refuses the commit or cannot be reached.
    """
    api = HfApi()
    make_repository(api, repo_id, private=private)
    if tag and any(found.name == tag for found in api.list_repo_refs(repo_id).tags):
        raise ValueError(f"{repo_id} has a tag {tag!r} already; choose another.")
    operations = [CommitOperationAdd(file.path, folder / file.path) for file in files]
    commit = api.create_commit(repo_id, operations, commit_message=f"Push {tag}" if tag else "Push the model")
    if tag:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def make_repository(api: HfApi, repo_id: str, *, private: bool, repo_type: str | None = None, **options: str) -> None:
    """Make a repository if there is none. Raise a `ValueError` if it is public but must be private."""
    api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, **options)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub first, or leave --private out.")


def space_files(repo_id: str) -> dict[str, bytes]:
    """The files of a Space that shows the model `repo_id`, by name."""
    files = {name: (SPACE / name).read_bytes() for name in SPACE_FILES}
    files["README.md"] = files["README.md"].replace(SPACE_MODEL.encode(), repo_id.encode())
    return files


def upload_space(space_id: str, repo_id: str, *, private: bool) -> str:
    """Send the Space `space_id` as one commit, and tell it the model `repo_id`. Raises the errors of [`upload`].

    Returns:
        The commit's URL.
    """
    api = HfApi()
    make_repository(api, space_id, private=private, repo_type="space", space_sdk="gradio")
    api.add_space_variable(space_id, "SERA_MODEL", repo_id)  # first, because the commit starts the Space
    operations = [CommitOperationAdd(name, content) for name, content in space_files(repo_id).items()]
    return api.create_commit(space_id, operations, commit_message="Push the Space", repo_type="space").commit_url


def describe_refusal(error: Exception, repo_id: str) -> str:
    """The error of the Hub, or of the connection to it, as one sentence."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the error of a file that is sent on its own
    if not isinstance(error, HfHubHTTPError):
        return f"The Hub cannot be reached at {HfApi().endpoint}: {in_one_line(error)}"
    status = error.response.status_code
    if status == 401:
        return "The Hub does not accept the token (401); log in with `hf auth login`, or set HF_TOKEN to a token with write access."
    if status == 403:
        return f"The token may not write to {repo_id} (403); use a token that may, or another name."
    return f"The Hub refused {repo_id} ({status}): {in_one_line(error.server_message or error)}"


def push_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(
        description="Publish a trained SERA on the Hub: weights, code, processor, endpoint handler and model card."
    )
    parser.add_argument("folder", type=str, help="a run's folder, or its model's")
    parser.add_argument("repo_id", type=str, help="repository on the Hub: user/name")
    parser.add_argument(
        "--evaluation",
        type=str,
        action="append",
        default=[],
        help="JSON file of training/evaluation.py or training/papers_table.py; may be given several times",
    )
    parser.add_argument(
        "--example",
        type=str,
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "EXPRESSION"),
        help="an image that you may publish, and an expression about it, for the card's gallery; may be given several times "
        "(default for a model of scenes: three held-out scenes)",
    )
    parser.add_argument("--private", action="store_true", help="make the repository and the Space private")
    parser.add_argument("--revision-tag", type=str | None, default=None, metavar="v1", help="tag for the commit")
    parser.add_argument(
        "--space", type=str | None, default=None, metavar="user/name", help="also publish a Space that shows the model"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")
    parser.add_argument(
        "--output", type=str | None, default=None, metavar="DIR", help="also keep the files in this new folder"
    )
    return parser


def check_repository(repo_id: str) -> None:
    """Raise a `ValueError` if a name does not have the form user/name."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it must have the form user/name")
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository on the Hub: {in_one_line(error)}") from error


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = push_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for repo_id in (options.repo_id, *([] if options.space is None else [options.space])):
        check_repository(repo_id)
    tag = options.revision_tag
    if tag is not None and not re.fullmatch(r"\w[\w.-]*", tag):
        raise ValueError(
            f"--revision-tag {tag!r}: a tag consists of letters, digits, '_', '-' and '.', for example v1."
        )
    if options.output is not None and Path(options.output).exists():
        raise ValueError(f"--output {options.output} exists already; name a new folder.")
    model_folder = find_model(Path(options.folder))
    if not options.dry_run and get_token() is None:
        raise ValueError("There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN.")

    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / "model"
        files = stage(
            model_folder,
            options.repo_id,
            staged,
            evaluations=[Path(path) for path in options.evaluation],
            examples=[(image, text) for image, text in options.example],
        )
        sys.stdout.writelines(f"{file}\n" for file in files)
        if options.output is not None:
            kept = Path(options.output)
            with writing(kept):
                shutil.copytree(staged, partial_folder(kept), dirs_exist_ok=True)
                replace_folder(kept)
        total = sum(file.size for file in files)
        if options.space is not None:
            for name, content in space_files(options.repo_id).items():
                listed = PushedFile(f"spaces/{options.space}/{name}", len(content), hashlib.sha256(content).hexdigest())
                sys.stdout.write(f"{listed}\n")
        if options.dry_run:
            also = "" if options.space is None else f", the Space to {options.space}"
            logger.info(f"{len(files)} files, {total} bytes, would go to {options.repo_id}{also}; nothing was sent")
            return
        goal = options.repo_id
        try:
            url = upload(goal, staged, files, private=options.private, tag=tag)
            logger.info(f"{len(files)} files, {total} bytes: {url}" + (f", tagged {tag}" if tag else ""))
            if options.space is not None:
                goal = options.space
                logger.info(f"the Space: {upload_space(goal, options.repo_id, private=options.private)}")
        except (HTTPError, RuntimeError) as error:
            raise OSError(describe_refusal(error, goal)) from error


if __name__ == "__main__":
    run_command(main, in_one_line)
