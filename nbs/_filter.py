"Quarto's ipynb filter: nbdev's directives and cross links, for notebooks that stand one folder deep. The site without Quarto calls it too."

import io, os, re, sys
from contextlib import redirect_stdout
from json import loads
from pathlib import Path


def pages_of_modules(folder):
    "What nbdev takes for a module's page (`plots.html`) and the notebook that it is (`40_plots.ipynb`)."
    return {re.sub(r'^\d+_', '', p.stem): p.name for p in sorted(folder.glob('[0-9]*_*.ipynb'))}


def own_links(text, root, site):
    """Links to the published site become links to notebooks, which are right in every copy of the site, and the name of a notebook
    (`40_plots`, `reports/claims`) becomes a link to it. Code keeps its backticks."""
    notebooks, fenced, lines = pages_of_modules(root / 'nbs'), False, text.splitlines(True)
    symbol, name = (
        re.compile(rf'\[`([^`]+)`\]\({re.escape(site)}nbs/(\w+)\.html(#[^)]*)?\)'),
        re.compile(r'(?<!\[)`((?:(?:nbs|reports|guides)/)?\w+)`'),
    )

    def to_symbol(m):
        return f'`{m[1]}`' if fenced or m[2] not in notebooks else f'[`{m[1]}`](../nbs/{notebooks[m[2]]}{m[3] or ""})'

    def to_page(m):
        path = m[1] if '/' in m[1] else f'nbs/{m[1]}' if m[1][0].isdigit() else None
        return f'[{m[0]}](../{path}.ipynb)' if path and not fenced and (root / f'{path}.ipynb').exists() else m[0]

    for i, line in enumerate(lines):
        fenced ^= line.startswith('```')
        lines[i] = name.sub(to_page, symbol.sub(to_symbol, line))
    return ''.join(lines)


def for_readers(text, folder):
    "A notebook's JSON as the site shows it: directives obeyed, API shown, symbols linked. `folder` holds it."
    os.environ['IN_TEST'] = '1'
    from execnb.nbio import dict2nb, nb2str
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults

    nb, cfg = dict2nb(loads(text)), get_config(path=folder)
    nb.path_ = folder / 'notebook.ipynb'  # Quarto doesn't tell the name
    with redirect_stdout(io.StringIO()):
        FilterDefaults()(nb)  # what processors print must not get into the notebook
    nb.metadata.pop('widgets', None)
    where = cfg.config_path, f'{cfg.doc_host}{cfg.doc_baseurl}/'
    for cell in nb.cells:
        if cell.cell_type == 'raw':
            cell.source = re.sub(
                r'^output-file:.*\n', '', cell.source, flags=re.M
            )  # a page is named after its notebook
        if cell.cell_type == 'code' and folder.name == 'reports' and cell.source.strip():
            cell.source = f'#| code-fold: true\n{cell.source}'  # read for its figures
        if cell.cell_type == 'markdown':
            cell.source = own_links(cell.source, *where)
        for data in (o['data'] for o in cell.get('outputs', []) if 'data' in o):
            if 'text/markdown' in data:
                data['text/markdown'] = own_links(''.join(data['text/markdown']), *where).splitlines(True)
    return nb2str(nb)


def write_for_readers(src, dst):
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(for_readers(src.read_text(), src.parent))


if __name__ == '__main__':
    print(for_readers(sys.stdin.read(), Path.cwd()), end='')
