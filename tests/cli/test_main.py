"""The command line as a user meets it: one clear line and exit code 1 for whatever is wrong."""

import gzip
import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from lightning_itk.cli.main import main

RECORDS = [
    {"prompt": f"say {word}", "completion": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ITK_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "train.jsonl", RECORDS)
    return tmp_path


def write(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(folder: str, **data) -> str:
    defaults = {"train": "train.jsonl", "validation": 0.25, "batch_size": 2, "num_proc": 1, "max_length": 64}
    init = {"student": folder, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}}
    return json.dumps(
        {
            "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "num_sanity_val_steps": 0},
            "model": {"class_path": "lightning_itk.SFTModule", "init_args": init},
            "data": defaults | data,
        }
    )


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys, *args: str) -> str:
    """The one line of an error."""
    code, _, err = run(capsys, *args)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("lightning-itk: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert lines[0].startswith("lightning-itk: error: "), err
    return lines[0]


def test_fit_validate_test_and_export_work_end_to_end(here, capsys, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (here / "c.yaml").write_text(config(model_folder("llama")))
    callbacks = '[{"class_path": "lightning_itk.callbacks.HFExport", "init_args": {"dirpath": "out"}}]'
    code, out, err = run(capsys, "fit", "--config", "c.yaml", "--trainer.callbacks", callbacks)
    assert code == 0, err
    assert "SFTModule" in out  # the run card
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(here / "out/last"),
        AutoTokenizer.from_pretrained("out/best"),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say ab"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    (checkpoint,) = (here / "runs").rglob("*.ckpt")
    torch.load(checkpoint, weights_only=True)
    write(here / "prompts.jsonl", [{"prompt": "say ab"}, {"prompt": "say something longer"}, {"prompt": "x"}])
    predict = ["--data.predict", "prompts.jsonl", "--model.init_args.max_new_tokens", "4"]
    code, _, err = run(capsys, "predict", "--config", "c.yaml", "--ckpt_path", str(checkpoint), *predict)
    assert code == 0, err
    (responses,) = (here / "runs").rglob("responses.jsonl")
    assert [json.loads(line)["record"] for line in responses.read_text().splitlines()] == [0, 1, 2]
    for stage in ("validate", "test"):
        code, out, err = run(capsys, stage, "--config", "c.yaml", "--ckpt_path", str(checkpoint))
        assert code == 0, err
        assert "perplexity" in out


def test_help_lists_every_command_and_the_modules_arguments(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in (
        "fit",
        "validate",
        "test",
        "predict",
        "quickstart",
        "select",
        "prune",
        "choose-teacher",
        "export",
        "generate",
    ):
        assert name in out
    code, out, _ = run(capsys, "fit", "--model.help", "lightning_itk.KDModule")
    assert code == 0
    assert "Weight of the cross-entropy with the responses" in out
    assert "Folder or hub name that AutoModelForCausalLM reads" in out


BAD_FILES = {
    "missing file": (None, r"nowhere.jsonl"),
    "empty file": (b"", r"train.jsonl"),
    "broken JSON": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', r"train.jsonl line 2.*broken JSON"),
    "not a record": (b"[1, 2]\n", r"train.jsonl"),
    "wrong type": (b'{"prompt": "a", "completion": 5}\n', r"line 1.*completion"),
    "missing response": (b'{"prompt": "a"}\n', r"line 1"),
    "empty response": (b'{"prompt": "a", "completion": " "}\n', r"line 1"),
    "unknown role": (b'{"messages": [{"role": "wizard", "content": "x"}]}\n', r"line 1.*wizard"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}\n', r"line 1.*assistant"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}\n', r"line 1.*UTF-8"),
    "tools": (
        b'{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}\n',
        r"tools: learn",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_one_line(case, here, capsys, model_folder):
    content, expected = BAD_FILES[case]
    if content is None:
        (here / "c.yaml").write_text(config(model_folder("llama"), train="nowhere.jsonl"))
    else:
        (here / "train.jsonl").write_bytes(content)
        (here / "c.yaml").write_text(config(model_folder("llama")))
    line = error_of(capsys, "fit", "--config", "c.yaml")
    import re

    assert re.search(expected, line), line
    assert not list((here / "cache").rglob("*.arrow")) if (here / "cache").exists() else True


def test_a_template_that_does_not_end_is_one_line(here, capsys, model_folder):
    endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    (here / "c.yaml").write_text(config(model_folder("llama"), chat_template=endless))
    assert "line 1: the chat template does not come to an end" in error_of(capsys, "fit", "--config", "c.yaml")


def test_broken_gzip_is_one_line(here, capsys, model_folder):
    good = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 500)
    (here / "train.jsonl.gz").write_bytes(good[: len(good) // 2])
    (here / "c.yaml").write_text(config(model_folder("llama"), train="train.jsonl.gz"))
    assert "train.jsonl.gz" in error_of(capsys, "fit", "--config", "c.yaml")


def test_max_length_too_small_for_every_record(here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama"), max_length=4))
    assert "max_length" in error_of(capsys, "fit", "--config", "c.yaml")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.batchsize", "3"], "batchsize"),
        (["--model.init_args.lerning_rate", "3"], "lerning_rate"),
        (["--model", "lightning_itk.NoModule"], "NoModule"),
        (["--model.init_args.max_scratch_bytes", "1e9"], "max_scratch_bytes"),
        (["--model.init_args.max_scratch_bytes", "-1"], "max_scratch_bytes must be positive"),
        (["--data.batch_size", "many"], "batch_size"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments_are_one_line(args, expected, here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama")))
    assert expected in error_of(capsys, "fit", "--config", "c.yaml", *args)


def test_unknown_yaml_key_and_unknown_command(here, capsys, model_folder):
    text = json.loads(config(model_folder("llama")))
    text["data"]["max_lenght"] = 3
    (here / "c.yaml").write_text(json.dumps(text))
    assert "max_lenght" in error_of(capsys, "fit", "--config", "c.yaml")
    assert "unknown command 'fitt'" in error_of(capsys, "fitt")


def test_bad_models_are_one_line(here, capsys, tmp_path):
    tiny_model().save_pretrained(here / "student")
    byte_tokenizer().save_pretrained(here / "student")
    (here / "student" / "model.safetensors").unlink()
    (here / "c.yaml").write_text(config("./student"))
    assert "student" in error_of(capsys, "fit", "--config", "c.yaml")
    (here / "c.yaml").write_text(config("./missing"))
    assert "'./missing' does not exist" in error_of(capsys, "fit", "--config", "c.yaml")
    tiny_model(vocab_size=100).save_pretrained(here / "small")
    byte_tokenizer().save_pretrained(here / "small")
    (here / "c.yaml").write_text(config("./small"))
    assert "has only 100 embeddings" in error_of(capsys, "fit", "--config", "c.yaml")


def test_a_tokenizer_without_a_pad_token_is_no_error(here, capsys):
    tiny_model().save_pretrained(here / "student")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(here / "student")
    (here / "c.yaml").write_text(config("./student"))
    code, _, err = run(capsys, "fit", "--config", "c.yaml", "--trainer.max_steps", "1")
    assert code == 0, err


def test_other_tokenizer_and_unknown_teacher_tag(here, capsys, model_folder, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tiny_model().save_pretrained(here / "teacher")
    text = byte_tokenizer().backend_tokenizer.to_str().replace('"A":35', '"A":36').replace('"B":36,', '"B":35,')
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text)).save_pretrained(here / "teacher")
    text = json.loads(config(model_folder("llama")))
    text["model"]["class_path"] = "lightning_itk.KDModule"
    text["model"]["init_args"]["teacher"] = "./teacher"
    (here / "kd.yaml").write_text(json.dumps(text))
    assert "different tokenizers: token 35" in error_of(capsys, "fit", "--config", "kd.yaml")
    text["model"]["class_path"] = "lightning_itk.DAEModule"
    del text["model"]["init_args"]["teacher"]
    text["model"]["init_args"]["teachers"] = {"reference": model_folder("llama", 1)}
    text["data"]["train"] = [{"path": "train.jsonl", "teacher": "wizard"}]
    (here / "dae.yaml").write_text(json.dumps(text))
    assert "teacher 'wizard'" in error_of(capsys, "fit", "--config", "dae.yaml")


def test_a_subclass_beside_the_configuration_is_found(here, capsys, model_folder):
    (here / "my_sft.py").write_text(
        "import lightning_itk as itk\n\n\nclass MySFT(itk.SFTModule):\n"
        "    def __init__(self, student: str, *, scale: float = 1.0, **kwargs):\n"
        "        super().__init__(student, **kwargs)\n        self.scale = scale\n"
    )
    (here / "c.yaml").write_text(config(model_folder("llama")).replace("lightning_itk.SFTModule", "my_sft.MySFT"))
    extra = ["--model.init_args.scale", "2.0", "--trainer.max_steps", "1", "--trainer.precision", "bf16-mixed"]
    code, out, err = run(capsys, "fit", "--config", "c.yaml", *extra)
    assert code == 0, err
    assert "MySFT" in out


@pytest.mark.parametrize("where", ["yaml", "command line"])
def test_a_json_list_is_data_and_no_configuration(where, here, capsys, model_folder):
    """jsonargparse would open it as a part of the configuration where it sees a class in the type."""
    (here / "train.json").write_text(json.dumps(RECORDS))
    (here / "c.yaml").write_text(config(model_folder("llama"), train="train.json" if where == "yaml" else "nowhere"))
    extra = [] if where == "yaml" else ["--data.train", "train.json"]
    code, out, err = run(capsys, "fit", "--config", "c.yaml", "--trainer.max_steps", "1", *extra)
    assert code == 0, err
    (saved,) = (here / "runs").rglob("config.yaml")
    assert "train: train.json" in saved.read_text()


def test_the_users_own_config_is_never_overwritten(here, capsys, model_folder):
    (here / "config.yaml").write_text(config(model_folder("llama")))
    before = (here / "config.yaml").read_text()
    quick = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"]
    for _ in range(2):
        code, _, err = run(capsys, "fit", "--config", "config.yaml", "--trainer.logger", "false", *quick)
        assert code == 0, err
    assert (here / "config.yaml").read_text() == before
    assert {"config-2.yaml", "config-3.yaml"} <= {path.name for path in here.iterdir()}


def test_the_last_checkpoint_of_a_log_dir(here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama")))
    fit = ["fit", "--config", "c.yaml", "--trainer.default_root_dir", "place", "--trainer.limit_val_batches", "0"]
    code, _, err = run(capsys, *fit, "--ckpt_path", "last")
    assert code == 1
    assert err.splitlines()[-1] == "lightning-itk: error: ckpt_path is last, but there is no checkpoint in place"
    assert run(capsys, *fit)[0] == 0
    assert not (here / "runs").exists()
    (first,) = (here / "place").rglob("*.ckpt")
    code, _, err = run(capsys, *fit, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert code == 0, err
    (second,) = set((here / "place").rglob("*.ckpt")) - {first}
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (first, second)]
    assert steps[1] == 2 * steps[0] > 0


def test_broken_checkpoints_are_one_line(here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama")))
    assert run(capsys, "fit", "--config", "c.yaml", "--trainer.limit_val_batches", "0")[0] == 0
    (whole,) = (here / "runs").rglob("*.ckpt")
    (here / "cut.ckpt").write_bytes(whole.read_bytes()[:-1000])
    (here / "junk.ckpt").write_text("no checkpoint")
    for name, reason in (("cut", "is no checkpoint of this kit"), ("junk", "is no checkpoint"), ("none", "no such")):
        code, _, err = run(capsys, "fit", "--config", "c.yaml", "--ckpt_path", f"{name}.ckpt")
        assert code == 1
        assert f"lightning-itk: error: {name}.ckpt: {reason}" in err.splitlines()[-1]
        assert "weights_only" not in err


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_no_checkpoint_is_executed_from_wherever_it_comes(here, capsys, model_folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (here / "c.yaml").write_text(config(model_folder("llama")))
    torch.save({"state_dict": {}, "hyper_parameters": {}, "global_step": 0, "callbacks": Evil()}, here / "evil.ckpt")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=str(here))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for path in ("evil.ckpt", f"http://127.0.0.1:{server.server_port}/evil.ckpt"):
            code, _, err = run(capsys, "fit", "--config", "c.yaml", "--ckpt_path", path)
            assert code == 1, path
            assert "evil.ckpt" in err
            assert not (here / "executed").exists()
    finally:
        server.shutdown()


def test_what_frameworks_refuse_is_no_bug(here, capsys, model_folder):
    text = config(model_folder("llama"))
    (here / "c.yaml").write_text(text)
    (here / "bare.yaml").write_text(json.dumps(json.loads(text) | {"model": {"student": "somewhere"}}))
    error = error_of(capsys, "fit", "--config", "bare.yaml")
    assert "model has no class_path, expected lightning_itk.SFTModule, lightning_itk.KDModule" in error
    for kind in ("EarlyStopping", "ModelCheckpoint"):
        callbacks = json.dumps([{"class_path": kind, "init_args": {"monitor": "val_loss"}}])
        code, _, err = run(capsys, "fit", "--config", "c.yaml", "--trainer.callbacks", callbacks)
        assert code == 1
        assert "val_loss" in err.splitlines()[-1]
        assert "val/response_loss" in err.splitlines()[-1]
        assert "bug" not in err


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # for the latter, transformers makes a tokenizer of one token
def test_a_folder_without_a_tokenizer_is_one_line(arch, here, capsys, model_folder):
    tiny_model(arch).save_pretrained(here / "student")
    (here / "c.yaml").write_text(config("./student"))
    line = error_of(capsys, "fit", "--config", "c.yaml")
    assert line.endswith("folder './student' holds no tokenizer: save one there, or name another in data.tokenizer")
    more = ("--data.tokenizer", model_folder("llama"), "--trainer.max_steps", "1")
    code, _, err = run(capsys, "fit", "--config", "c.yaml", *more)
    assert code == 0, err


def test_figures_of_validation_samples_are_not_passed_off_as_test(here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama")))
    with pytest.warns(UserWarning, match=r"^data\.test names no file: the figures test/… are those of the validation"):
        assert run(capsys, "test", "--config", "c.yaml")[0] == 0
    line = error_of(capsys, "test", "--config", "c.yaml", "--data.validation", "0")
    assert line.endswith("test names no file, and there are no validation samples: set data.test to files")


def test_lines_stay_readable_and_what_is_no_trainer_is_named(here, capsys, model_folder):
    for trainer, said in ((None, "null"), ([{"max_epochs": 1}], "a list")):
        (here / "c.yaml").write_text(json.dumps(json.loads(config(model_folder("llama"))) | {"trainer": trainer}))
        assert f"trainer is {said}, expected arguments" in error_of(capsys, "fit", "--config", "c.yaml")
    (here / "c.yaml").write_text(json.dumps([[{"data": {"train": ["train.jsonl"] * 1000}}]]))
    assert len(error_of(capsys, "fit", "--config", "c.yaml")) < 1100


def test_null_for_a_number_is_one_line(here, capsys):
    content = {"model": "m", "output": "o.jsonl", "prompts": "p.jsonl", "batch_size": None}
    (here / "c.yaml").write_text(json.dumps(content))
    assert error_of(capsys, "generate", "--config", "c.yaml").endswith("batch_size is null, expected a value")


def test_a_class_where_data_belong_is_no_bug(here, capsys):
    content = {"model": "m", "output": "o.jsonl", "prompts": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}}
    (here / "c.yaml").write_text(json.dumps(content))
    assert error_of(capsys, "generate", "--config", "c.yaml").endswith(
        "prompts has no field class_path, expected a path or {path, …}"
    )


def test_weights_alone_are_no_checkpoint_to_go_on_from(here, capsys, model_folder):
    (here / "c.yaml").write_text(config(model_folder("llama")))
    init = {"dirpath": str(here), "filename": "weights", "save_weights_only": True}
    saving = json.dumps([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}])
    fit = ("fit", "--config", "c.yaml", "--trainer.callbacks", saving)
    assert run(capsys, *fit)[0] == 0
    assert "contains only the model" in error_of(capsys, *fit, "--ckpt_path", "weights.ckpt")
