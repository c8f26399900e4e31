"""Flags and YAML files: types, messages, precedence, help."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import yaml
from support.command_line import status

from cem_fast.cli import main
from cem_fast.config import GridConfig, RunConfig, described


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "--nose-std", "3"], "unknown setting 'nose_std'; did you mean 'noise_std'?"),
        (["evalute"], "unknown command 'evalute'; did you mean 'evaluate'?"),
        ([], "expected one of the commands demo, train, attack, evaluate, figures, data, doctor, bench"),
        (["evaluate", "--epochs", "many"], "epochs must be int, got many"),
        (["evaluate", "--image-size", "big"], "image_size must be int or null, got big"),
        (["evaluate", "--noise-std", "-1"], "noise_std must be at least 0, got -1.0"),
        (["evaluate", "--defenses", "nois"], "unknown defense 'nois'"),
        (["evaluate", "--defenses", "[{defense: nois}]"], "unknown defense 'nois'"),
        (["evaluate", "--defenses", "[{defense: noise, epoch: 3}]"], "unknown setting of a defense 'epoch'"),
        (["evaluate", "--defenses", "[{noise_std: 3}]"], "defenses must each have a name under 'defense'"),
        (["train", "--cem-by-class", "maybe"], "cem_by_class must be bool, got maybe"),
        (["train", "--defense", "bottlenek"], "the nearest is 'bottleneck'"),
        (["train", "--data", "fases"], "the nearest is 'faces'"),
        (["train", "--cem-weight", "1", "--noise-std", "0"], "noise_std must be positive where cem_weight is"),
        (["train", "--device", "tpu"], "device must be cpu, cuda or cuda:<index>, got 'tpu'"),
        (["train", "--seed", "9" * 23], f"seed must be at most {2**63 - 1}, got {'9' * 23}"),
        (["evaluate", "--attacks", "[]"], "attacks must list at least one value, got none"),
        (["attack", "nowhere"], "nowhere: no finished run here"),
        (["attack"], "attack needs run: see cem-fast attack --help"),
        (["data"], "data needs action and name: see cem-fast data --help"),
        (["evaluate", "--config", "missing.yaml"], "the file given as --config is not there, or is no file: '"),
        (["evaluate", "--jobs", "-1"], "jobs must be an integer of at least 0, got -1"),
        (["demo", "--config", "my.yaml"], "config is no setting of this command"),
        (["demo", "--seeds", "x"], "seeds must be int, got x"),
        (["demo", "--jobs", "x"], "jobs must be an integer of at least 0, got x"),
        (["train", "--data", ""], "the data set must be one of faces, digits, "),
        (
            ["figures", "sweeps", "missing.yaml"],
            "source must be a folder of results or a grid's YAML file, and 'missing.yaml'",
        ),
        (["evaluate", "--noise-std"], "option '--noise-std' requires an argument"),
        (["evaluate", "--noise-std", ""], "noise_std must be float, got ''"),
        (["evaluate", "--image-size", ""], "image_size must be int or null, got ''"),
        (["evaluate", "--seeds", "[0"], "seeds must be list, got [0"),
        (["evaluate", "--seeds", "0,true"], "seeds must be int, got True"),
        (["evaluate", "--defenses", "[3]"], "defenses must be str or settings, got 3"),
        (["evaluate", "--per-data", "3"], "per_data must be settings, got 3"),
        (["evaluate", "--cem-by-class", "0"], "cem_by_class must be bool, got 0"),
        (["evaluate", "--epochs", "2.0"], "epochs must be int, got 2.0"),
        (["train", "--ep", "3"], "unknown setting 'ep'"),
        (["train", "--seeds", "3"], "seeds is no setting of this command"),
        (["evaluate", "--secure"], "secure is no setting of this command, since evaluations repeat their draws from a"),
        (["tune", "--secure"], "secure must be False here, since evaluations repeat their draws from a seed"),
        (["evaluate", "--defenses", "[{defense: noise, secure: true}]"], "secure must not be set in a grid, since"),
        (["train", "--resume=true"], "option '--resume' does not take a value"),
        (["train", "x", "y"], "unrecognized arguments: x y"),
        (["figures", "sweeps"], "figures needs source: see cem-fast figures --help"),
        (["xyz"], "unknown command 'xyz'"),
        (["figures", "sweeps", ".", "--folder", "there"], "folder is for the runs of a YAML file, and . is a folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cem-fast: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("noise_sdt: 3\n", "unknown setting 'noise_sdt'; did you mean 'noise_std'?"),
        ("noise_std: [3\n", "the file given as --config is not YAML"),
        ("seeds: 3\n", "seeds must be list, got 3"),
        ("", "the file given as --config must hold settings, one 'name: value' a line, got nothing"),
        ("only text\n", "must hold settings, one 'name: value' a line, got only text"),
        ("name: caf\xe9\n", "the file given as --config is not UTF-8 text: "),
        ("epochs: null\n", "epochs must be int, got None"),
        ("3: 4\n", "the names of settings in the file given as --config must be text, got 3"),
        ("config: other.yaml\n", "must not name another file under 'config'"),
        (
            "epochs: !!python/object/apply:os.system [ls]\n",
            "the file given as --config is not YAML: could not determine",
        ),
        ("epochs: &a [*a]\n", "more than 100,000 values, counted with repetitions by aliases"),
        (
            "a: &a [0,0,0,0,0,0,0,0]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in pairwise("abcdefgh")),
            "more than 100,000 values, counted with repetitions by aliases",
        ),
        ("[" * 5000 + "\n", "the file given as --config is not YAML: "),
        ("name: null\n", "name must be str, got None"),
        ("epochs: 3\nepochs: 4\n", "'epochs' is set twice"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "merges by << are not read"),
        ("epochs: 1" + "0" * 400 + "\n", "the file given as --config is not YAML: an integer of more than 64 bits"),
        ("epochs: 1" + "0" * 5000 + "\n", "the file given as --config is not YAML: Exceeds the limit"),
        ("epochs: 0x" + "f" * 5000 + "\n", "the file given as --config is not YAML: an integer of more than 64 bits"),
        ("epochs: " + "1:" * 5000 + "1\n", "the file given as --config is not YAML: an integer of more than 64 bits"),
        ("epochs: !!timestamp x\n", "the file given as --config is not YAML: "),
        ("epochs: !!int x\n", "the file given as --config is not YAML: "),
        ("epochs: !!bool x\n", "the file given as --config is not YAML: "),
        ("# " + "x" * 300_000 + "\n", "the file given as --config must have at most 200,000 bytes"),
        ('name: "\\e[2J\\x9b/"\n', "must be usable as the name of a folder, got '\\x1b[2J\\x9b/'"),
    ],
)
def test_bad_yaml_exits_with_2_and_one_line(text, message, capfd, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    assert status("evaluate", "--config", str(path)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("name", ["2024", "sp ace: x#1", "yes", "a'b", 'a"b\\', "münchen"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_any_name_of_a_folder_is_taken_as_it_is(name, joint):
    flag = ["--data", name] if joint == " " else [f"--data={name}"]
    found = parsed("evaluate", *flag, "--attacks", "ridge, decoder")
    assert (found["data"], found["attacks"]) == ((name,), ("ridge", "decoder"))


@pytest.mark.parametrize(
    "command, start",
    [("data", "fetch downloads a published data set"), ("attack", "seed of all random choices of the attacks")],
)
def test_help_says_what_to_give(command, start, capfd):
    assert status(command, "--help") == 0
    assert start in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("where", ["file", "flag", "names"])
def test_defenses_with_settings_of_their_own(config, where, capfd):
    text = "[bottleneck, {defense: noise_arl, noise_std: 0.15, adversary_weight: 0.5}]"
    arguments = ["--undefended", "[]", "--cem-weights", "0", "--dry-run"]
    if where == "file":
        config.write_text(config.read_text() + f"defenses: {text}\n")
    else:
        arguments += ["--defenses", text if where == "flag" else "bottleneck,noise_arl"]
    assert status("evaluate", "--config", str(config), *arguments) == 0
    out = capfd.readouterr().out
    assert "[1/2] tiny / bottleneck at noise 0.1, seed 0" in out
    assert f"[2/2] tiny / noise_arl at noise {0.1 if where == 'names' else 0.15}, seed 0" in out
    settings = yaml.safe_load(out[: out.index("[1/2]")])
    again = GridConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    assert again.runs()[1].adversary_weight == (0.3 if where == "names" else 0.5)


def parsed(*arguments: str) -> dict:
    """The values that a command gets."""
    return main.PROGRAM.main(arguments, "cem-fast", standalone_mode=False)[1]


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--folds", "0"], "folds", (0,)),
        (["--folds", "0,1"], "folds", (0, 1)),
        (["--folds", "[0, 1]"], "folds", (0, 1)),
        (["--seeds=0,1"], "seeds", (0, 1)),
        (["--seeds", "0", "--seeds", "1"], "seeds", (1,)),
        (["--noise_levels=1,.5"], "noise_levels", (1.0, 0.5)),
        (["--noise_std", "1e-1"], "noise_std", 0.1),
        (["--noise-std=1"], "noise_std", 1.0),
        (["--epochs", "010"], "epochs", 10),
        (["--image-size", "null"], "image_size", None),
        (["--cem-by-class", "no"], "cem_by_class", False),
        (["--bottleneck", "8"], "bottleneck", 8),
        (["--bottleneck", "K5C8S2"], "bottleneck", "K5C8S2"),
        (["--undefended", ""], "undefended", ()),
        (["--data", "[faces, '2024']"], "data", ("faces", "2024")),
        (["--defenses", "[{defense: noise_arl, noise_std: 0.15}]"], "defenses", ({"defense": "noise_arl", "noise_std": 0.15},)),
        (["--per-data", "{digits: {epochs: 3}}"], "per_data", {"digits": {"epochs": 3}}),
        (["--folder", "null"], "folder", None),
        (["--dry_run"], "dry_run", True),
    ],
)  # fmt: skip
def test_a_value_has_the_type_of_its_setting(arguments, name, value):
    found = parsed("evaluate", *arguments)[name]
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_flags_and_files_counts(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("epochs: 2\nnoise-std: 1\njobs: 3\nlearning_rate: 1e-2\n")
    second.write_text("epochs: 5\n")
    flag, files = ["--epochs", "9"], ["--config", str(first), "--config", str(second)]
    found = parsed("evaluate", *flag, *files)
    assert [found[key] for key in ("epochs", "noise_std", "jobs", "learning_rate")] == [5, 1.0, 3, 0.01]
    assert parsed("evaluate", *files, *flag)["epochs"] == 9
    assert parsed("evaluate", *files[:2], *flag, *files[2:])["epochs"] == 5
    assert "config" not in found


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command, config", [("train", RunConfig), ("evaluate", GridConfig)])
def test_help_lists_every_setting_under_its_heading(command, config, columns, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert status(command, "--help") == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    found = re.findall(r"^  --([\w-]+)|^([A-Z].*):$", out, re.MULTILINE)
    heading, under = "", {}
    for flag, title in found:
        heading = title or heading
        under[flag.replace("-", "_")] = heading.lower()
    for setting in described(config).values():
        assert under[setting.name] == setting.group.lower()
        assert setting.text
        assert "``" not in out


@pytest.mark.parametrize("spelling", ["--print-config", "--print_config"])
def test_printed_settings_are_a_file_of_settings(spelling, capfd, tmp_path):
    assert status("evaluate", "--noise-std", "0.2", "--folds", "0,1", spelling) == 0
    printed = capfd.readouterr().out
    assert yaml.safe_load(printed)["folds"] == [0, 1]
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert status("evaluate", "--config", str(path), spelling) == 0
    assert capfd.readouterr().out == printed
