"""Every word of the nodes exists in every language, says something there, and reaches the frontend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from locale_words import LANGUAGES, SYNTAX, english, escaped, flat, own_schemas, unescaped

LOCALES = Path(__file__).resolve().parents[1] / "locales"
SCRIPT = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")}
NUMBERS = re.compile(r"\d+(?:\.\d+)?")
UPDATE = "run: python dev.py locales --comfyui PATH"


def words(language: str) -> dict[str, str]:
    return flat(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def test_no_other_language_is_half_there():
    assert {folder.name for folder in LOCALES.iterdir()} == set(LANGUAGES)


def test_english_is_what_the_nodes_say(server):
    wanted = flat(english(own_schemas(server.object_info())))
    assert words("en") == wanted, UPDATE


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_every_text_is_translated(language):
    english_words, translated = words("en"), words(language)
    assert sorted(set(english_words) - set(translated)) == [], f"missing in {language}; {UPDATE}"
    assert sorted(set(translated) - set(english_words)) == [], f"left over in {language}; {UPDATE}"
    sentences = {path: text for path, text in translated.items() if not path.endswith(".name")}
    assert [path for path, text in sentences.items() if not SCRIPT[language].search(text)] == []


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_give_the_same_numbers(language):
    """A default or range that is changed in English only would mislead."""
    wrong = []
    for path, text in words("en").items():
        if path.endswith("tooltip"):
            said = {number for number in NUMBERS.findall(text) if "." in number or len(number) > 1}
            missing = [number for number in said if number not in words(language)[path]]
            wrong += [(path, missing)] if missing else []
    assert wrong == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_survive_the_frontends_message_syntax(language):
    """vue-i18n reads @ { } | $ as syntax: a bare one shows an error instead of the text."""
    assert [path for path, text in words(language).items() if SYNTAX.search(re.sub(r"\{'.'\}", "", text))] == []


def test_escaping_is_undone_by_the_frontend():
    assert escaped("a {b} | c@d") == "a {'{'}b{'}'} {'|'} c{'@'}d"
    assert unescaped(escaped("a {b} | c@d $1")) == "a {b} | c@d $1"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_server_hands_them_out(server, language):
    served = server.get_json("/i18n")[language]
    assert {name: served["nodeDefs"][name] for name in ("FaceEmbed", "MultiIDMaskRouter")} == {
        name: json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[name]
        for name in ("FaceEmbed", "MultiIDMaskRouter")
    }
