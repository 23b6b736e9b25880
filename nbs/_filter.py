"A notebook as the site shows it: nbdev's directives obeyed, the API shown, names linked. Called by `_docs.py`."

import ast
import inspect
import io
import os
import re
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from unittest.mock import patch


def names_on_pages(
    names,  # nbdev's table of a package: module: name with its module: (address, file, address of the file)
    module,  # that of the page which is made; '' if its notebook exports none
):  # name, with and without its module: the same three
    """Where the site explains each name. Pages have a heading for every public function and class: a method leads to
    its class, and a private name leads nowhere. Of equal names of several modules the page's own comes first, then
    that of the least nested module."""
    found = {}
    for mod in sorted(names, key=lambda m: (m != module, m.count('.'))):
        for name, (address, *source) in names[mod].items():
            short = name.removeprefix(f'{mod}.')
            if not short.startswith('_'):
                page, anchor = address.split('#')
                for n in (short, name):
                    found.setdefault(n, (f"{page}#{anchor.split('.')[0]}", *source))
    return found


def pages_of_modules(
    root,  # the repository
):  # page as nbdev names it: notebook, both relative to `root`
    "nbdev drops the number of a notebook: the page of `nbs/05_slot_attention.ipynb` is `nbs/slot_attention` for it."
    notebooks = [p.relative_to(root) for p in sorted(root.glob('nbs/**/[!_.]*.ipynb'))]
    return {(p.parent / re.sub(r'^\d+_', '', p.stem)).as_posix(): p for p in notebooks}


def own_links(
    text,  # markdown
    root,  # the repository
    site,  # address of the published site, with a slash at the end
    folder,  # folder from which the links start
):
    """Links to the published site become relative links to notebooks, and the name of a notebook in backticks
    (`05_slot_attention`, `formats/movi`, `reports/claims`) becomes a link to it. Code blocks keep their backticks."""
    pages, fenced, lines = pages_of_modules(root), False, text.splitlines(True)
    symbol = re.compile(rf'\[`([^`]+)`\]\({re.escape(site)}([\w/]+)\.html(#[^)]*)?\)')
    name = re.compile(r'(?<!\[)`((?:\w+/)*\w+)`')

    def link(label, page, anchor=''):
        return f'[`{label}`]({Path(os.path.relpath(root / page, folder)).as_posix()}{anchor})'

    def to_symbol(m):
        return f'`{m[1]}`' if fenced or m[2] not in pages else link(m[1], pages[m[2]], m[3] or '')

    def to_page(m):
        if fenced or not ('/' in m[1] or m[1][0].isdigit()):
            return m[0]
        found = [p for p in (f'{m[1]}.ipynb', f'nbs/{m[1]}.ipynb') if (root / p).is_file()]
        return link(m[1], found[0]) if found else m[0]

    for i, line in enumerate(lines):
        fenced ^= line.startswith('```')
        lines[i] = name.sub(to_page, symbol.sub(to_symbol, line))
    return ''.join(lines)


NUMBER_SPACE = re.compile(r'(?<=[\d\w)]) ± (?=[\d.])|(?<=\d) (?=%)')


def keep_together(
    text,  # markdown or HTML
):
    "No line ends inside `0.763 ± 0.008` or `95 %`: no-break spaces, but not in code."
    parts = re.split(r'(^```.*?^```|`[^`\n]+`|<(?:pre|code)\b.*?</(?:pre|code)>)', text, flags=re.M | re.S)
    return ''.join(
        p if i % 2 else NUMBER_SPACE.sub(lambda m: m[0].replace(' ', '\N{NO-BREAK SPACE}'), p)
        for i, p in enumerate(parts)
    )


def fields_signature(
    cls,  # a NamedTuple
):
    "Its fields as nbdev shows the parameters of a function: one a line, with the comments of the source."
    lines = dedent(inspect.getsource(cls)).splitlines()
    shown, above = [], []
    nodes = {n.lineno: n for n in ast.parse('\n'.join(lines)).body[0].body if isinstance(n, ast.AnnAssign)}
    for number, line in enumerate(lines, 1):
        if node := nodes.get(number):
            default = f'={ast.unparse(node.value)}' if node.value else ''
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip() or ' '.join(above)
            shown.append(f'    {node.target.id}:{ast.unparse(node.annotation)}{default}, {comment}'.rstrip())
        above = above + [line.strip()] if line.strip().startswith('#') else []
    return '\n'.join(shown)


def mend_signature(
    text,  # what nbdev shows for a name, markdown
    module,  # that exports it
):
    "nbdev shows `*args, **kwargs` for a NamedTuple, an exception and a widget: the fields, or no signature."
    block = re.compile(r'```python\ndef (\w+)\(\n    \*args(?::object)?, \*\*kwargs(?::object)?\n\)[^\n]*:\n```\n')
    if not (m := block.search(text)):
        return text
    found = getattr(import_module(module), m[1])
    fields = hasattr(found, '_fields')
    shown = f'```python\ndef {m[1]}(\n{fields_signature(found)}\n):\n```\n' if fields else ''
    return text[: m.start()] + shown + text[m.end() :]


def printed_table(
    output,  # of a cell
):
    "What is printed are sentences, which wrap. A printed table becomes a display, which keeps its columns and scrolls."
    lines = ''.join(output.get('text', [])).splitlines()
    if output.get('name') != 'stdout' or sum(bool(re.search(r'\S {3,}\S', line)) for line in lines) < 2:
        return output
    return dict(output_type='display_data', metadata={}, data={'text/plain': output['text']})


def join_code(
    cells,  # of a report
):
    "Code cells without output join the code cell that follows, so that a page does not open with a row of folds."
    joined = []
    for cell in cells:
        before = joined[-1] if joined else None
        if before and before.cell_type == cell.cell_type == 'code' and not before.get('outputs'):
            directives, code = [], []
            for line in cell.source.splitlines():
                (directives if line.startswith('#|') else code).append(line)
            cell.source = '\n'.join([*directives, before.source.rstrip(), '', *code])
            joined.pop()
        joined.append(cell)
    return joined


def for_readers(
    path,  # a notebook of this repository
):  # its JSON as the site shows it
    "Run nbdev's processors on a notebook, fold the code of reports, and link names to pages."
    os.environ['IN_TEST'] = '1'
    from execnb.nbio import nb2str, read_nb
    from nbdev.config import get_config
    from nbdev.doclinks import NbdevLookup
    from nbdev.processors import FilterDefaults

    nb, cfg = read_nb(path), get_config(path=path.parent)
    exported = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(c.source for c in nb.cells), re.M)
    lookup, lib = NbdevLookup(), cfg.lib_path.name  # its table is kept, so that every later lookup finds the same
    names = names_on_pages(lookup.entries[lib]['syms'], f'{lib}.{exported[1]}' if exported else '')
    others = {n: where for n, where in lookup.syms.items() if where[1].split('/')[0] != lib}
    with redirect_stdout(io.StringIO()), patch.dict(lookup.syms, others | names, clear=True):
        FilterDefaults()(nb)
    nb.metadata.pop('widgets', None)
    where = cfg.config_path, f'{cfg.doc_host}{cfg.doc_baseurl}/', path.parent
    report = path.parent.name == 'reports'
    if report:
        nb.cells = join_code(nb.cells)
    for cell in nb.cells:
        if cell.cell_type == 'raw':
            cell.source = re.sub(
                r'^output-file:.*\n', '', cell.source, flags=re.M
            )  # a page is named after its notebook
        if cell.cell_type == 'code' and report and cell.source.strip():
            cell.source = f'#| code-fold: true\n{cell.source}'  # reports are read for their figures
        if cell.cell_type == 'code':  # the signature stands above the source that nbdev adds
            cell.source = cell.source.replace('#| code-fold: show\n', '#| code-fold: true\n', 1)
        if cell.cell_type == 'markdown':
            cell.source = keep_together(own_links(cell.source, *where))
        if cell.get('outputs'):
            cell.outputs = [printed_table(o) for o in cell.outputs]
        for data in (o['data'] for o in cell.get('outputs', []) if 'data' in o):
            if 'text/markdown' in data:
                text = own_links(''.join(data['text/markdown']), *where)
                text = mend_signature(text, f'{lib}.{exported[1]}') if exported else text
                data['text/markdown'] = keep_together(text).splitlines(True)
            if 'text/html' in data:
                data['text/html'] = keep_together(''.join(data['text/html'])).splitlines(True)
    return nb2str(nb)


def write_for_readers(src, dst):
    dst.parent.mkdir(parents=True, exist_ok=True)
    dst.write_text(for_readers(src))
