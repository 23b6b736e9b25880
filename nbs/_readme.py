"README.md from index.ipynb: the alt texts of its figures are taken over, other directives are not shown."

import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
nb, alts = nbformat.read(root / 'nbs/index.ipynb', 4), []
for cell in (c for c in nb.cells if c.cell_type == 'code'):
    found = re.match(r'#\| fig-alt: (.*)', cell.source)
    alts += [found[1]] * sum('image/png' in o.get('data', {}) for o in cell.outputs) if found else []
    cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
text, resources = exporter.from_notebook_node(nb, dict(unique_key='README', output_files_dir='README_files'))
for old in (root / 'README_files').glob('*'):
    old.unlink()
for name, data in resources['outputs'].items():
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
pictures = iter(alts)
(root / 'README.md').write_text(re.sub(r'!\[png\]', lambda _: f'![{next(pictures)}]', text).rstrip() + '\n')
