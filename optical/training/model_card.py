"""Model cards: role, partner, base, languages and data of a trained model, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Sentence that says what a recipe does.
_RECIPES = {
    "teacher": "trained on pairs of queries and passages, with the other passages of a batch as "
    "negatives",
    "codeswitch": "trained on pairs of queries and passages that were code-switched through "
    "bilingual lexicons",
    "distill": "distilled from a frozen teacher on parallel sentences",
    "transfer": "given a vocabulary of other languages by vocabulary transfer, without training",
    "average": "made by averaging the weights of models that were fine-tuned from one model",
    "encoder": "pre-trained as a masked language model",
}
# Options that name files of training data.
_DATA = ("pairs", "queries", "passages", "bitext", "text", "lexicon", "validation")
# A language code before the suffix of a file, as in `en-sw.tsv`, `corpus.en` or `sw.txt`.
_CODE = re.compile(r"(?:^|[-._/])([a-z]{2,3})(?=[-._]|$)")
_LANGUAGES = (
    "af am ar as az be bg bn bo br bs ca ceb cs cy da de el en eo es et eu fa fi fil fr ga gl "
    "gu ha he hi hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky lo lt lv mg mk ml mn mr "
    "ms mt my ne nl nn no ny om or pa pl ps pt qu ro ru rw sa sd si sk sl sn so sq sr su sv "
    "sw ta te tg th ti tk tl tr tt ug uk ur uz vi wo xh yi yo zh zu "
)


def model_card(options: Any, model: Any, citation: str = "") -> str:
    """Return the text of README.md for a model of a recipe.

    Args:
        options: options of the recipe.
        model: the model; a ``MultiVectorEncoder``, or the encoder of the recipe `encoder`.
        citation: BibTeX entry of the method.

    Returns:
        Markdown with YAML metadata that the Hugging Face hub reads. It quotes no training data.
    """
    recipe = type(options).__name__.removesuffix("Options").lower()
    values = vars(options)
    base = _base(recipe, values)
    data = {name: _names(values[name]) for name in _DATA if values.get(name)}
    languages = _languages(name for names in data.values() for name in names)
    dimension = getattr(model, "get_embedding_dimension", lambda: None)()
    lines = ["---", *_metadata(recipe, base, languages), "---", ""]
    lines += [f"# A {_kind(recipe)}", "", f"This model was {_RECIPES[recipe]}, with `optical`.", ""]
    facts = {
        "Role": _role(recipe, values),
        "Teacher, and partner in search": _code(values.get("teacher")),
        "Started from": ", ".join(map(_code, base)),
        "Objective": f"{values['objective']}, epsilon {values['epsilon']:g}"
        if values.get("objective") in ("ot", "divergence")
        else values.get("objective", ""),
        "Languages, by the names of the files": ", ".join(languages),
        "Token vectors": f"{dimension} dimensions, compared by MaxSim" if dimension else "",
        **{f"Data ({name})": ", ".join(map(_code, names)) for name, names in data.items()},
    }
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value]
    lines += ["", "Settings, versions and losses: `run.json` beside this folder.", ""]
    lines += ["## Usage", "", *_usage(recipe, values)]
    if citation:
        lines += ["", "## Citation", "", "```bibtex", citation.strip(), "```"]
    return "\n".join(lines) + "\n"


def _metadata(recipe: str, base: list[str], languages: list[str]) -> list[str]:
    sentence_model = recipe != "encoder"
    lines = ["library_name: sentence-transformers"] if sentence_model else []
    lines += ["pipeline_tag: feature-extraction" if sentence_model else "pipeline_tag: fill-mask"]
    lines += ["tags:", "- optical"]
    lines += ["- late-interaction", "- multi-vector"] if sentence_model else []
    for key, entries in (("language", languages), ("base_model", [*filter(_on_hub, base)])):
        lines += [f"{key}:", *(f'- "{entry}"' for entry in entries)] if entries else []
    return lines


def _kind(recipe: str) -> str:
    return "multilingual encoder" if recipe == "encoder" else "late-interaction retriever"


def _base(recipe: str, values: Mapping[str, Any]) -> list[str]:
    if recipe == "average":
        return list(values["models"])
    if recipe == "distill":
        return [values["student"] or values["teacher"]]
    return [values["model"]] if values.get("model") else []


def _on_hub(name: str) -> bool:
    """Return whether a model has the form of a name on the hub and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _names(value: Any) -> list[str]:
    """Return the names of files, without their folders, which are of this machine."""
    files = [value] if isinstance(value, str) else value
    return [Path(name.split("=", 1)[-1]).name for name in files]


def _languages(names: Iterable[str]) -> list[str]:
    codes = {code for name in names for code in _CODE.findall(name.lower())}
    return sorted(codes & set(_LANGUAGES.split()))


def _code(name: str | None) -> str:
    return f"`{name}`" if name else ""


def _role(recipe: str, values: Mapping[str, Any]) -> str:
    if recipe == "encoder":
        return "encoder of other models; no retriever"
    if recipe != "distill":
        return "queries and documents"
    other = "queries" if values["role"] == "document" else "documents"
    return f"{values['role']}s in the other language; the teacher encodes English {other}"


def _usage(recipe: str, values: Mapping[str, Any]) -> list[str]:
    if recipe == "encoder":
        return ["```sh", "optical train teacher --model FOLDER --pairs pairs.tsv \\",
                "    --output_dir runs/teacher", "```"]  # fmt: skip
    names = {"query": "model", "document": "model"}
    models = ['model = MultiVectorEncoder("FOLDER")  # the folder of this file, or its name']
    if recipe == "distill":
        names["document" if values["role"] == "query" else "query"] = "teacher"
        models.append(f'teacher = MultiVectorEncoder("{values["teacher"]}")')
    return [
        "```python",
        "from sentence_transformers import MultiVectorEncoder",
        "",
        *models,
        f'queries = {names["query"]}.encode_query(["the text of a query"])',
        f'documents = {names["document"]}.encode_document(["the text of a document"])',
        "scores = model.similarity(queries, documents)",
        "```",
    ]
