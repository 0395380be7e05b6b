"""The study on real text: the shipped example, cut to a few steps. Needs the data pack."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `study`)")
pytest.importorskip("sentence_transformers", reason="needs the extra `study`")

EXAMPLE = Path(__file__).parent.parent / "examples" / "clir_pack.yaml"

pytestmark = pytest.mark.skipif(
    not os.environ.get("OPTICAL_DATA"),
    reason="the variable OPTICAL_DATA names no folder with the data pack",
)


def test_example_fits_the_data(tmp_path: Path):
    from optical.config import read_config
    from optical.study import Study

    Study(read_config(EXAMPLE, tmp_path)).check()


@pytest.mark.slow
def test_example_reads_all_its_inputs_and_reports(tmp_path: Path):
    from optical.study import run_study

    raw = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    raw["encoder"] |= {"vocabulary_size": 2000, "hidden_size": 16}
    raw["encoder"]["bitext"] = raw["encoder"]["bitext"][:1]
    del raw["encoder"]["text"]
    few = {"max_steps": 2, "per_device_train_batch_size": 8}
    raw["encoder"]["arguments"] |= few
    raw["teacher"]["arguments"] |= few
    for name in ("ot", "codeswitch"):
        raw["arms"][name]["arguments"] |= few
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(raw), encoding="utf-8")

    report = run_study(small, tmp_path / "out")

    numbers = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    cells = {(row["collection"], row["arm"], row["language"]) for row in numbers["means"]}
    arms = [(arm, language) for arm in raw["arms"] for language in ("sw", "de")]
    assert cells == {
        (collection, arm, language)
        for collection in ("first-sentence", "title")
        for arm, language in [*arms, ("English documents", "en")]
    }
    assert all(one["queries"] in (107, 281) for one in numbers["comparisons"])
    assert "Swahili" in report.read_text(encoding="utf-8")
