"`make readme`: write the map of nbs/index.ipynb from the sidebar of _quarto.yml and the title cells, then README.md."

import json
import re
import sys
from pathlib import Path
import nbformat
import yaml
from nbconvert import MarkdownExporter
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).parent))
from _docs import hrefs
from _filter import own_links

ROOT = Path(__file__).parent.parent
MAP = '## The map\n\n'
INTRO = 'Every page in the order of reading. The core notebooks build on each other; the rest can be read in any order.'


def title_cell(path):
    "Title and description of a notebook, from its first cell."
    first = ''.join(json.loads(path.read_text())['cells'][0]['source'])
    found = re.fullmatch(r'# (\S[^\n]*)\n\n> (\S[^\n]*)\n?', first)
    if not found:
        raise ValueError(f'{path}: the first cell must read "# Title", an empty line, "> one line", and no more')
    return found.groups()


def the_map(root=ROOT):
    "The section of the README that lists every page: its name and the description in its title cell."
    text = [MAP + INTRO]
    for entry in yaml.safe_load((root / '_quarto.yml').read_text())['website']['sidebar']['contents']:
        if isinstance(entry, dict):
            text += [f"\n**{entry['section']}**\n"]
            for page in map(Path, hrefs(entry['contents'])):
                name = page.with_suffix('').as_posix().removeprefix('nbs/')
                name = name if '/' in name or name[0].isdigit() else f'nbs/{name}'
                text += [f'- `{name}`: {title_cell(root / page)[1]}']
    return '\n'.join(text)


def write_map(root=ROOT):
    path = root / 'nbs/index.ipynb'
    nb = json.loads(path.read_text())
    (cell,) = [c for c in nb['cells'] if ''.join(c['source']).startswith(MAP)]
    cell['source'] = the_map(root).splitlines(True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')


def readme(root=ROOT):
    "README.md as text, its pictures by path. A picture's alt text is its cell's `fig-alt`; directives are dropped."
    nb, alts = nbformat.read(root / 'nbs/index.ipynb', 4), []
    nb.metadata.language_info = dict(name='python')  # colors the code on GitHub
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = own_links(cell.source, root, '', root)
        else:
            found = re.match(r'#\| fig-alt: (.*)', cell.source)
            alts += [found[1]] * sum('image/png' in o.get('data', {}) for o in cell.outputs) if found else []
            if '#| echo: false' in cell.source:
                cell.metadata['tags'] = ['without code']
            if '#| echo: false' in cell.source:
                cell.metadata['tags'] = ['without code']
            cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
    hidden = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'without code'}))
    exporter = MarkdownExporter(config=hidden, exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(nb, dict(unique_key='README', output_files_dir='README_files'))
    pictures = iter(alts)
    text = re.sub(r'!\[png\]', lambda _: f'![{next(pictures)}]', text).rstrip() + '\n'
    return text, resources['outputs']


def main():
    write_map()
    text, pictures = readme()
    for old in (ROOT / 'README_files').glob('*'):
        old.unlink()
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / 'README.md').write_text(text)


if __name__ == '__main__':
    main()
