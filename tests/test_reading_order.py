"The order of reading is the sidebar of _quarto.yml; file numbers, the README's map and links agree with it."

import importlib.util
import json
import os
import re
from pathlib import Path
import pytest
import yaml
from conftest import ROOT

spec = importlib.util.spec_from_file_location('_readme', ROOT / 'nbs/_readme.py')
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)
from _filter import own_links, pages_of_modules  # nbs/_readme.py adds nbs/ to the path

SIDEBAR = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['sidebar']['contents']
SECTIONS = {e['section']: e['contents'] for e in SIDEBAR if isinstance(e, dict)}
PAGES = [*readme.hrefs(SIDEBAR)]
NOTEBOOKS = sorted(
    name
    for folder in ('nbs', 'guides', 'reports')
    for p in (ROOT / folder).rglob('*.ipynb')
    if not re.search(r'(^|/)[._]', name := p.relative_to(ROOT).as_posix())
)
INDEX = json.loads((ROOT / 'nbs/index.ipynb').read_text())['cells']


def prose(path):
    "The markdown of a notebook without its code blocks."
    cells = [c for c in json.loads((ROOT / path).read_text())['cells'] if c['cell_type'] == 'markdown']
    return re.sub(r'^```.*?^```', '', '\n\n'.join(''.join(c['source']) for c in cells), flags=re.M | re.S)


def test_every_notebook_is_in_the_sidebar_once():
    assert not [p for p in PAGES if not (ROOT / p).is_file()], 'the sidebar lists a page that does not exist'
    assert len(PAGES) == len(set(PAGES))
    assert set(NOTEBOOKS) == set(PAGES) - {'CHANGELOG.md'}
    assert PAGES[0] == 'nbs/index.ipynb' and PAGES[-1] == 'CHANGELOG.md'


def test_the_core_is_numbered_in_the_order_of_reading():
    core = SECTIONS['Core']
    assert core == [p for p in NOTEBOOKS if re.match(r'nbs/\d', p)]
    assert [int(Path(p).name[:2]) for p in core] == [*range(len(core))]


def test_each_section_holds_its_own_folder():
    folder_of = {
        'Core': 'nbs',
        'Variants': 'nbs/variants',
        'Mask head': 'nbs/mask_head',
        'Segment': 'nbs/segment',
        'Video': 'nbs/video',
        'Explorer': 'nbs/explorer',
        'Formats': 'nbs/formats',
        'Scenes': 'nbs/scenes',
        'Runs': 'nbs/runs',
        'Fast': 'nbs/fast',
        'Commands': 'nbs/commands',
        'Appendix': 'nbs/appendix',
        'Guides': 'guides',
        'Reports': 'reports',
    }
    assert [*SECTIONS] == [*folder_of]
    for section, pages in SECTIONS.items():
        folders = {str(Path(p).parent) for p in pages if p != 'nbs/explore.ipynb'}
        assert folders == {folder_of[section]}, section


def test_the_map_is_the_sidebar():
    (cell,) = [''.join(c['source']) for c in INDEX if ''.join(c['source']).startswith(readme.MAP)]
    assert cell == readme.the_map(), 'run `make readme`'
    listed = re.findall(r'^- `([\w/]+)`: \S', cell, re.M)
    paths = [f'{n}.ipynb' if (ROOT / f'{n}.ipynb').is_file() else f'nbs/{n}.ipynb' for n in listed]
    assert paths == [p for p in PAGES if p not in ('nbs/index.ipynb', 'CHANGELOG.md')]


def test_readme_is_made_from_the_index_notebook():
    text, pictures = readme.readme()
    assert (ROOT / 'README.md').read_text() == text, 'run `make readme`'
    assert {p.name: p.read_bytes() for p in (ROOT / 'README_files').iterdir()} == {
        Path(name).name: data for name, data in pictures.items()
    }
    links = re.findall(r'\]\(((?!https?://)[^)#]+)', text)
    assert len(links) > len(NOTEBOOKS) and not [n for n in links if not (ROOT / n).is_file()]


def test_every_question_leads_to_a_page():
    text = (ROOT / 'README.md').read_text()
    rows = [r for r in text.split('## Find your way')[1].split('\n## ')[0].splitlines() if r.startswith('| ')][1:]
    assert len(rows) == 13
    for row in rows:
        assert '.ipynb)' in row and '`' not in re.sub(r'\[`[^`]+`\]\([^)]+\)', '', row), row


@pytest.mark.parametrize('path', NOTEBOOKS)
def test_title_cell(path):
    "nbdev turns the title cell into title and description and drops what else is in it; the map shows the description."
    first = next(c for c in json.loads((ROOT / path).read_text())['cells'] if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# \S[^\n]*\n\n> \S[^\n]*\n?', ''.join(first['source'])), (
        f'{path}: a title, an empty line, one line that begins with "> ", and no more'
    )
    assert all(readme.title_cell(ROOT / path))


@pytest.mark.parametrize('path', NOTEBOOKS)
def test_links_and_names_of_pages(path):
    "Relative links of a notebook lead to a file; the number and name of a core notebook in backticks are up to date."
    text = prose(path)
    for link in re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', text):
        assert ((ROOT / path).parent / link).exists(), f'{path}: {link} leads nowhere'
    for name in re.findall(r'(?<!\[)`(\d\d_[a-z_]+)`', text):
        assert (ROOT / f'nbs/{name}.ipynb').is_file(), f'{path}: there is no notebook `{name}`'


def test_names_become_links_from_any_depth():
    site = 'https://slotnb.github.io/slotnb/'
    text = f'''`05_slot_attention`, `formats/movi`, `reports/claims`, `guides/tutorial`, `nbs/explore`;
[`A`]({site}nbs/formats/movi.html#a), [`B`]({site}nbs/slot_attention.html), [`C`]({site}nowhere.html), `core`, `a/b`
```
`formats/movi`
```
'''
    for folder in ('', 'guides', 'nbs', 'nbs/fast', 'nbs/formats'):
        made = own_links(text, ROOT, site, ROOT / folder)
        links = dict(re.findall(r'\[`([^`]+)`\]\(([^)]+)\)', made))
        target = {k: os.path.normpath(f'{folder}/{v}'.lstrip('/')) for k, v in links.items()}
        assert target.pop('A') == 'nbs/formats/movi.ipynb#a' and target.pop('B') == 'nbs/05_slot_attention.ipynb'
        assert target['05_slot_attention'] == 'nbs/05_slot_attention.ipynb'
        names = ('formats/movi', 'reports/claims', 'guides/tutorial', 'nbs/explore')
        assert [target[n].removeprefix('nbs/') for n in names] == [f'{n}.ipynb'.removeprefix('nbs/') for n in names]
        assert 'C' not in links and '`core`, `a/b`\n```\n`formats/movi`\n```\n' in made
    made = own_links('`fast/blocks` `03_features`', ROOT, site, ROOT / 'nbs/fast')
    assert made == '[`fast/blocks`](blocks.ipynb) [`03_features`](../03_features.ipynb)'


def test_nbdev_names_pages_as_the_filter_expects():
    "Every page that nbdev links to, as in slotnb/_modidx.py, is the page of a notebook."
    index = {}
    exec((ROOT / 'slotnb/_modidx.py').read_text(), index)
    named = {page.split('.html')[0] for symbols in index['d']['syms'].values() for page, _ in symbols.values()}
    assert len(named) > 20 and named <= set(pages_of_modules(ROOT))
