"""kt-sft convert: the folder that it writes is what kt_weight_path takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kt_sft.cli import convert
from kt_sft.cli.errors import CommandError
from kt_sft.config import KtConfig
from kt_sft.models.convert import from_pretrained
from kt_sft.weights.verify import verify
from tests.integrations.tiny import LAYERS, SENTENCES, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "model")


@pytest.fixture(autouse=True)
def level_of_the_logger() -> Iterator[None]:
    logger = logging.getLogger("kt_sft")
    level = logger.level
    yield
    logger.setLevel(level)


def run(model: Path, output: Path, **options) -> None:
    defaults = {
        **{"to": "int8", "group_size": None, "experts": None, "threads": None},
        **{"calibration": None, "calibration_tokens": 1024, "trust_remote_code": False},
    }
    convert.run(str(model), output, **{**defaults, **options})


@pytest.mark.parametrize(
    "options",
    [{"to": "int8"}, {"to": "int4", "group_size": 64}, *({"to": name} for name in ("auto", "fp8", "mxfp4", "AMXINT8"))],
    ids=str,
)
def test_training_with_the_lines_that_it_prints_packs_nothing(model, tmp_path, capsys, caplog, options):
    run(model, tmp_path / "out", **options)
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*.ktpack")
    assert f"{file}: whole" in printed
    settings = yaml.safe_load(printed[printed.index("kt_config:") :])["kt_config"]
    assert KtConfig.from_dict(settings).group_size == options.get("group_size")
    caplog.clear()
    with caplog.at_level(logging.INFO, "kt_sft"):
        from_pretrained(model, config=settings)
    assert "Packing" not in caplog.text
    assert "layers of experts packed as" in caplog.text
    (found,) = verify(tmp_path / "out", progress=False)
    assert sum(found.formats.values()) == LAYERS


def test_calibrated(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 60))
    run(model, tmp_path / "out", to="int4", calibration=text)
    assert f"{LAYERS} layers" in capsys.readouterr().out


def test_errors_are_one_line(model, tmp_path):
    cases = {
        "weight_format: expected one of": {"to": "int5"},
        "expected int4, whose rounding it improves": {"calibration": model / "config.json"},
        "No such file": {"calibration": tmp_path / "absent", "to": "int4"},
    }
    for message, options in cases.items():
        with pytest.raises(CommandError, match=message) as error:
            run(model, tmp_path / "out", **options)
        assert "\n" not in str(error.value)


def test_ctrl_c_says_how_to_go_on(model, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_pack", interrupted)
    with pytest.raises(CommandError, match="the same command continues where it ended"):
        run(model, tmp_path / "out")
