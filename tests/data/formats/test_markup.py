"""TMX, TBX, TEI and Apertium's dictionaries: the pairs that come out, what is said of them, and the errors."""

import pytest

from tests.support.word_lists import NOUNS, PAIRS, WORDS, message, read
from tli.data.pair_store import Pair


def tmx(words, one="sw", two="en") -> str:
    unit = '<tu><tuv xml:lang="{}"><seg>{}</seg></tuv><tuv xml:lang="{}"><seg>{}</seg></tuv></tu>\n'
    return f'<tmx version="1.4"><header/><body>{"".join(unit.format(one, a, two, b) for a, b in words)}</body></tmx>'


@pytest.mark.parametrize(
    ("source", "target"), [("swahili", "english"), ("sw", "en"), ("SWH", "eng"), ("Kiswahili", "English"), ("swa", "EN")]
)
@pytest.mark.parametrize(("one", "two"), [("sw", "en"), ("sw-KE", "en-US"), ("swh", "EN-GB"), ("swa", "eng")])
def test_tmx_in_any_naming_of_its_languages(tmp_path, source, target, one, two):
    assert list(read(tmp_path, "a.tmx", tmx(WORDS, one, two), source, target)) == PAIRS
    assert list(read(tmp_path, "a.tmx", tmx(WORDS, two, one), source, target)) == [Pair(b, a) for a, b in WORDS]


def test_tmx_with_a_document_type_codes_and_missing_languages(tmp_path):
    head = '<?xml version="1.0" encoding="{}"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n<!-- made by hand -->\n'
    units = """<tmx version="1.4"><header/><body>
<tu><tuv xml:lang="sw"><seg><bpt i="1">&lt;b></bpt>café<ept i="1">&lt;/b></ept> kubwa</seg></tuv>
 <tuv lang="en"><seg>big <hi>café</hi></seg></tuv></tu>
<tu><tuv xml:lang="sw"><seg>peke</seg></tuv><tuv xml:lang="fr"><seg>seul</seg></tuv></tu>
</body></tmx>"""
    for encoding in ("utf-8", "iso-8859-1", "utf-16"):
        pairs = read(tmp_path, "a.xml", (head.format(encoding) + units).encode(encoding))
        assert list(pairs) == [Pair("café kubwa", "big café")]
        assert pairs.reading.notes() == ["left out, entries without both swahili and english: 1, 'peke, seul' (line 7)"]


def test_languages_that_are_not_there_are_refused_with_those_that_are(tmp_path):
    said = message(tmp_path, "a.tmx", tmx(WORDS), "hausa", "english")
    assert said == (
        "a.tmx: the list must hold the languages hausa and english, got the languages 'en', 'sw'; "
        "name two of these with --source and --target"
    )


@pytest.mark.parametrize("entry", ["martif termEntry langSet tig", "tbx conceptEntry langSec termSec"])
def test_tbx_of_both_generations(tmp_path, entry):
    root, concept, section, group = entry.split()
    concepts = "".join(
        f'<{concept} id="c{i}"><{section} xml:lang="en"><{group}><term>{b}</term></{group}><{group}><term>{b}2</term></{group}></{section}>'
        f'<{section} xml:lang="sw"><{group}><term>{a}</term></{group}></{section}></{concept}>\n'
        for i, (a, b) in enumerate(WORDS)
    )
    content = f'<?xml version="1.0"?><{root} xmlns="urn:iso:std:iso:30042:ed-2"><text><body>{concepts}</body></text></{root}>'
    assert list(read(tmp_path, "a.tbx", content)) == [Pair(a, b, (f"{b}2",)) for a, b in WORDS]


TEI = """<?xml version="1.0" encoding="UTF-8"?>
<TEI xmlns="http://www.tei-c.org/ns/1.0" version="5.0"><teiHeader/><text><body xml:lang="sw">
<entry><form><orth>ng'ombe</orth><pron>x</pron></form><gramGrp><pos>n</pos></gramGrp>
 <sense n="1"><cit type="trans" xml:lang="en"><quote>cow</quote></cit><cit type="trans" xml:lang="en"><quote>cattle, ox (male)</quote></cit>
  <cit type="example"><quote>Ng'ombe mkubwa.</quote></cit></sense></entry>
<entry><form><orth>peke</orth></form></entry>
</body></text></TEI>"""


def test_freedicts_tei(tmp_path):
    pairs = read(tmp_path, "swh-eng.tei", TEI)
    assert list(pairs) == [Pair("ng'ombe", "cow", ("cattle", "ox"), "noun")]
    assert pairs.reading.notes() == ["left out, entries without a translation: 1, 'peke' (line 6)"]
    assert list(read(tmp_path, "swh-eng.tei", TEI, "english", "swahili")) == [
        Pair(word, "ng'ombe", (), "noun") for word in ("cow", "cattle", "ox")
    ]
    assert "got the language 'en'; name it with --target en" in message(tmp_path, "swh-eng.tei", TEI, "swahili", "french")
    old = "<TEI.2><text><body><entry><form><orth>paka</orth></form><trans><tr>cat</tr></trans></entry></body></text></TEI.2>"
    assert list(read(tmp_path, "old.tei", old)) == [Pair("paka", "cat")]


def test_an_empty_tei_says_what_it_is(tmp_path):
    assert message(tmp_path, "a.tei", "<TEI/>") == (
        "a.tei:1: the list must hold at least one pair in what seems to be a TEI dictionary, got none; add pairs or name another file"
    )


def test_apertiums_bilingual_dictionaries(tmp_path):
    entries = "".join(f'<e><p><l>{a}<s n="n"/></l><r>{b}<s n="n"/></r></p></e>' for a, b in WORDS)
    assert list(read(tmp_path, "a.dix", f"<dictionary><section>{entries}</section></dictionary>")) == NOUNS
    more = """<?xml version="1.0"?>
<dictionary><alphabet/><sdefs><sdef n="n" c="Noun"/></sdefs><section id="main" type="standard">
<e r="LR"><p><l>kiti<b/>kirefu<s n="n"/></l><r>long<b/>chair<s n="n"/></r></p></e>
<e><i>redio<s n="n"/></i></e>
<e><re>[0-9]+</re></e>
</section></dictionary>"""
    pairs = read(tmp_path, "apertium-eng-swa.eng-swa.dix", more)
    assert list(pairs) == [Pair("long chair", "kiti kirefu", (), "noun"), Pair("redio", "redio", (), "noun")]
    assert list(read(tmp_path, "apertium-eng-swa.eng-swa.dix", more, "english", "swahili"))[0] == Pair(
        "kiti kirefu", "long chair", (), "noun"
    )
    alone = '<dictionary><pardefs/><section>\n<e lm="paka"><i>paka</i><par n="paka__n"/></e></section></dictionary>'
    assert "a.dix:2: the dictionary must be bilingual" in message(tmp_path, "a.dix", alone)


def test_broken_and_other_xml(tmp_path):
    assert "a.tmx:3: the file must be well-formed XML, got" in message(tmp_path, "a.tmx", "<tmx><body>\n<tu>\n</body></tmx>")
    assert "got an XLIFF translation file; convert it: xliff2tmx a.xlf words.tmx" in message(
        tmp_path, "a.xlf", "<xliff version='1.2'></xliff>"
    )
    assert "got XML with the root element 'book'; convert it" in message(tmp_path, "a.xml", "<?xml version='1.0'?><book/>")
    assert "got a web page; convert it" in message(tmp_path, "a.html", "<!DOCTYPE html><html></html>")
    laughs = (
        "<!DOCTYPE tmx [" + '<!ENTITY a "ha">' + "".join(f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcdefg", "bcdefgh")) + "]>"
    )
    assert "well-formed" in message(tmp_path, "a.tmx", laughs + "<tmx><body><tu><tuv lang='sw'><seg>&h;</seg></tuv></tu></body></tmx>")
