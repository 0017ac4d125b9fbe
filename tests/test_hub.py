"""The loopback Hub answers the real clients, and models go up to it and come down whole or not at all."""

import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hub_server import HubServer, hub_fixture  # noqa: F401  the fixture `hub`
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bestiary.cards import is_generated
from bestiary.export import run_without_package


@pytest.fixture
def api(hub, monkeypatch):
    """The real client, with its waits between retries left out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    """What a model repository holds: text, weights, a sub-folder."""
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 500)
    (path / "sub" / "notes.txt").write_text("notes")
    return path


def test_upload_list_and_download(hub, api, folder, tmp_path):
    assert api.whoami()["name"] == "user"
    assert api.create_repo("x").repo_id == "user/x"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("x")
    assert api.create_repo("x", exist_ok=True).repo_id == "user/x"
    first = api.upload_folder(repo_id="user/x", folder_path=folder, commit_message="first").oid
    assert api.upload_folder(repo_id="user/x", folder_path=folder).oid == first  # nothing new: no commit

    names = [".gitattributes", "README.md", "model.safetensors", "sub/notes.txt"]
    assert api.list_repo_files("user/x") == names
    assert [model.id for model in api.list_models(author="user")] == ["user/x"]
    assert [commit.title for commit in api.list_repo_commits("user/x")] == ["first", "initial commit"]
    top = {entry.path: entry for entry in api.list_repo_tree("user/x")}
    assert set(top) == {".gitattributes", "README.md", "model.safetensors", "sub"}
    assert top["model.safetensors"].lfs.size == 128000 and top["README.md"].lfs is None
    assert [entry.path for entry in api.get_paths_info("user/x", ["sub/notes.txt", "none"])] == ["sub/notes.txt"]
    assert api.file_exists("user/x", "README.md") and not api.file_exists("user/x", "none")

    snapshot = Path(api.snapshot_download("user/x", cache_dir=tmp_path / "cache"))
    assert snapshot.name == first
    for name in names[1:]:
        assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
    with HfFileSystem(endpoint=hub.endpoint, token=hub.token).open(
        "user/x/model.safetensors", block_size=1000
    ) as file:
        file.seek(1003)
        assert file.read(5) == (folder / "model.safetensors").read_bytes()[1003:1008]


def test_revisions_deletions_and_data_sets(hub, api, folder, tmp_path):
    api.create_repo("user/data", repo_type="dataset")
    common = {"repo_id": "user/data", "repo_type": "dataset"}
    first = api.upload_folder(**common, folder_path=folder).oid
    api.create_tag(**common, tag="v1")
    api.create_branch(**common, branch="dev")
    api.upload_file(**common, path_or_fileobj=b"on dev", path_in_repo="new.txt", revision="dev")
    api.delete_file("README.md", **common)
    api.delete_folder("sub", **common)
    refs = api.list_repo_refs(**common)
    assert [branch.name for branch in refs.branches] == ["main", "dev"]
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert api.list_repo_files(**common) == [".gitattributes", "model.safetensors"]
    assert "new.txt" in api.list_repo_files(**common, revision="dev")
    at_tag = Path(api.snapshot_download(**common, revision="v1", local_dir=tmp_path / "local"))
    assert (at_tag / "sub" / "notes.txt").read_text() == "notes"
    api.delete_repo(**common)
    assert not api.repo_exists(**common)
    assert not api.repo_exists("user/data")


def test_errors_have_the_types_of_the_real_hub(hub, api, folder):
    api.create_repo("user/x")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/missing")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="user/missing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/x", revision="missing")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("user/x", "missing.txt")
    stranger = HfApi(endpoint=hub.endpoint, token="hf_wrong")
    for call in (
        stranger.whoami,
        lambda: stranger.create_repo("y"),
        lambda: stranger.model_info("user/x"),
        lambda: stranger.upload_folder(repo_id="user/x", folder_path=folder),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)
    wrong_bytes = Request(f"{hub.endpoint}/lfs/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(HTTPError, match="400"):
        urlopen(wrong_bytes)
    assert list(hub.files("user/x")) == [".gitattributes"]
    assert not api.repo_exists("user/y")


@pytest.mark.parametrize("stage", ["PUT", "commit"])
def test_interrupted_upload_leaves_the_previous_revision(stage, hub, api, folder):
    api.create_repo("user/x")
    api.upload_folder(repo_id="user/x", folder_path=folder)
    sha, before = api.model_info("user/x").sha, hub.files("user/x")
    (folder / "model.safetensors").write_bytes(b"new" * 300_000)
    (folder / "README.md").write_text("# New\n")
    hub.drop(stage)
    with pytest.raises(Exception, match="Error while uploading|disconnected") as caught:
        api.upload_folder(repo_id="user/x", folder_path=folder)
    assert not isinstance(caught.value, HfHubHTTPError)  # no answer at all, not a refusal
    assert (api.model_info("user/x").sha, hub.files("user/x")) == (sha, before)
    hub.drop(stage, times=0)
    api.upload_folder(repo_id="user/x", folder_path=folder)
    assert hub.files("user/x")["model.safetensors"] == b"new" * 300_000


# Pushes, waiting for a line on its standard input before each push and saying on its standard output what came of it.
PUSH = """
import sys, time
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM

from bestiary.configuration.configuration_bert import BertPretrainingConfig
from bestiary.modeling.modeling_bert import BertPretrainingForMaskedLM

time.sleep = lambda seconds: None  # the client waits between its retries
config = BertPretrainingConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=12,
)
torch.manual_seed(0)
model = BertPretrainingForMaskedLM(config).eval()
input_ids = torch.arange(24).view(2, 12) + 5
expected = {"input_ids": input_ids}
for line in sys.stdin:
    name = line.strip()
    with torch.no_grad():
        model.cls.predictions.bias.add_(1.0)
        expected[name] = model(input_ids).logits
    try:
        if name == "wrong-token":
            model.push_to_hub("user/tiny", token="hf_wrong")
        elif name == "missing":
            AutoModelForMaskedLM.from_pretrained("user/missing")
        else:
            model.push_to_hub("user/tiny", commit_message=name)
        print("done", flush=True)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()), flush=True)
save_file(expected, sys.argv[1])
"""

PULL = """
import sys
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

expected = load_file(sys.argv[1])
commits = {commit.title: commit.commit_id for commit in HfApi().list_repo_commits("user/tiny")}
assert set(commits) == {"first", "second", "initial commit"}, commits
for name, revision in (("first", commits["first"]), ("second", None)):
    model = AutoModelForMaskedLM.from_pretrained("user/tiny", revision=revision, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.user.tiny."), type(model)
    with torch.no_grad():
        assert torch.equal(model(expected["input_ids"]).logits, expected[name]), name
model.push_to_hub("user/again", commit_message="from remote code")
again = AutoModelForMaskedLM.from_pretrained("user/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(expected["input_ids"]).logits, expected["second"])
"""


def test_push_then_load_in_a_process_without_bestiary(hub, tmp_path):
    """push_to_hub, interrupted pushes, a wrong token, a missing repository; then everything without bestiary."""
    expected = tmp_path / "expected.safetensors"
    command = [sys.executable, "-P", "-c", PUSH, str(expected)]
    with (
        (tmp_path / "stderr").open("w+") as errors,
        subprocess.Popen(
            command, env=hub.env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as pusher,
    ):

        def ask(name: str) -> str:
            pusher.stdin.write(name + "\n")
            pusher.stdin.flush()
            return pusher.stdout.readline().strip() or (tmp_path / "stderr").read_text()

        assert ask("first") == "done"
        first = hub.files("user/tiny")
        assert {"model.safetensors", "config.json", "modeling_bert.py", "encoder.py", "README.md"} <= set(first)
        assert is_generated(first["README.md"].decode())

        for stage in ("PUT", "commit"):
            hub.drop(stage)
            assert "Error while uploading" in (answer := ask(stage)) or "disconnected" in answer
            hub.drop(stage, times=0)
        assert "401" in ask("wrong-token")
        assert "user/missing" in (answer := ask("missing")) and answer.startswith("OSError")
        assert hub.files("user/tiny") == first

        assert ask("second") == "done"
        second = hub.files("user/tiny")
        assert {name for name in second if second[name] != first.get(name)} == {"model.safetensors"}
        pusher.stdin.close()
        assert pusher.wait(60) == 0

    result = run_without_package(PULL, expected, env=hub.env)
    assert result.returncode == 0, result.stderr
    assert hub.files("user/again")["encoder.py"] == first["encoder.py"]


TRAIN = """
import sys
from transformers import AutoModelForPreTraining
from bestiary.configuration.configuration_electra import ElectraJointConfig
from bestiary.trainers.masking import ElectraMaskingCollator, SpecialTokens
from bestiary.trainers.trainer_electra import ElectraTrainer, ElectraTrainingArguments

encoder = dict(
    vocab_size=30, embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16,
)
config = ElectraJointConfig(discriminator_config=encoder, generator_size_fraction=0.5)
model = AutoModelForPreTraining.from_config(config)
rows = [{"input_ids": [2, *range(5 + start, 13 + start), 3]} for start in range(16)]
special = SpecialTokens(cls_id=2, sep_id=3, pad_id=0, mask_id=4, vocab_size=30)
arguments = ElectraTrainingArguments(
    output_dir=sys.argv[1], push_to_hub=True, hub_model_id="user/trained", hub_strategy="every_save", max_steps=4,
    save_steps=2, logging_steps=1, warmup_steps=1, per_device_train_batch_size=4, disable_tqdm=True,
)
trainer = ElectraTrainer(model, arguments, data_collator=ElectraMaskingCollator(special), train_dataset=rows)
trainer.train()
trainer.push_to_hub()
"""


def test_a_trainer_pushes_weights_code_and_card(hub, tmp_path):
    """Trainer(push_to_hub=True): the repository holds what loads without bestiary, and the card of the run."""
    command = [sys.executable, "-P", "-c", TRAIN, str(tmp_path / "run")]
    done = subprocess.run(command, env=hub.env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = hub.files("user/trained")
    assert {"model.safetensors", "config.json", "modeling_electra.py", "training_args.bin", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert is_generated(card) and "discriminator_loss" in card and "ElectraJointForPreTraining" in card
    assert b"AutoModelForPreTraining" in files["config.json"]


def test_a_server_ends_with_its_block():
    with HubServer() as server:
        HfApi(endpoint=server.endpoint, token=server.token).create_repo("x")
        home = Path(server.env["HF_HOME"]).parent
        assert home.is_dir() and server.env["HF_ENDPOINT"] == server.endpoint
    assert not home.exists()
    with pytest.raises(Exception, match="refused"):
        HfApi(endpoint=server.endpoint, token=False).model_info("user/x")
