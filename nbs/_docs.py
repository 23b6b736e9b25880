"""`make docs`: the site in `_docs`, by Quarto where it is installed, by smalldocs where it is not, and every link, anchor and picture checked.
Both read the same `_quarto.yml`, and both see notebooks through `_filter.py`."""

import os, re, shutil, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
import yaml
from bs4 import BeautifulSoup

sys.path.insert(0, str(Path(__file__).parent))  # workers start with nothing
from _filter import write_for_readers

ROOT = Path(__file__).parent.parent
INSTALL = '''Quarto is not installed, so smalldocs builds the pages: the same texts and pictures in a simpler dress.
The published site is Quarto's; to have it here: https://quarto.org/docs/get-started/'''


def sources(root):
    "The files that `_quarto.yml` renders."
    wanted = yaml.safe_load((root / '_quarto.yml').read_text())['project']['render']
    return sorted({p for pattern in wanted for p in root.glob(pattern) if not p.name.startswith('_')})


def build_without_quarto(root, out):
    "The filter on every notebook whose copy is older than itself or the package, then smalldocs."
    from smalldocs.config import load
    from smalldocs.site import Site

    proc, todo = root / '_proc', []
    if {p.relative_to(proc) for p in proc.rglob('*.ipynb')} != {
        p.relative_to(root) for p in sources(root) if p.suffix == '.ipynb'
    }:
        shutil.rmtree(proc, ignore_errors=True)  # links change with names
    proc.mkdir(exist_ok=True)
    newest = max(p.stat().st_mtime for p in (root / 'settings.ini', *root.glob('slotnb/*.py'), *root.glob('nbs/_*.py')))
    for p in sources(root):
        dst = proc / p.relative_to(root)
        if dst.exists() and dst.stat().st_mtime > max(newest, p.stat().st_mtime):
            continue
        if p.suffix == '.ipynb':
            todo.append((p, dst))
        else:
            shutil.copy(p, dst)
    with ProcessPoolExecutor(mp_context=get_context('spawn')) as pool:
        list(pool.map(write_for_readers, *zip(*todo))) if todo else None
    for name in ('_quarto.yml', 'nbs/styles.css'):
        shutil.copy(root / name, proc / name)
    site = Site(load(proc), quiet=True)
    shutil.rmtree(out, ignore_errors=True)
    site.out = out
    site.build()


def front_door(out):
    "The address of the site's folder leads home."
    if not (out / 'index.html').exists():
        (out / 'index.html').write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>slotnb</title>'
            '<meta http-equiv="refresh" content="0; url=nbs/index.html"></head><body><a href="nbs/index.html">slotnb</a></body></html>\n'
        )


def check(
    out,  # folder of a built site
    root=ROOT,  # the repository, for links into its sources
):  # one sentence for each thing that is wrong
    "Every link inside the site, every anchor, every picture and its alt text; no directive and no path of a machine in what is read."
    pages = {
        p.relative_to(out).as_posix(): BeautifulSoup(p.read_text(), 'html.parser')
        for p in sorted(out.rglob('*.html'))
        if 'site_libs' not in p.parts
    }
    anchors = {
        name: {e['id'] for e in page.find_all(id=True)} | {e['name'] for e in page.find_all('a', attrs={'name': True})}
        for name, page in pages.items()
    }
    ini = dict(re.findall(r'^(\w+) *= *(.*)$', (root / 'settings.ini').read_text(), re.M))
    published, blob = ini['doc_host'] + ini['doc_baseurl'], f"{ini['git_url']}/blob/{ini['branch']}/"
    problems = []
    for p in sources(root):
        if (page := p.relative_to(root).with_suffix('.html').as_posix()) not in pages:
            problems.append(f'{page} is missing')
    for name, page in pages.items():

        def wrong(what):
            problems.append(f'{name}: {what}')

        for tag, attr in (
            ('a', 'href'),
            ('link', 'href'),
            ('img', 'src'),
            ('script', 'src'),
            ('source', 'src'),
            ('iframe', 'src'),
        ):
            for e in page.find_all(tag, attrs={attr: True}):
                link = e[attr]
                url = urlsplit(link)
                if link.startswith(published) and 'canonical' not in e.get('rel', []):
                    wrong(f'{link} leads to the published site, not to this one')
                if link.startswith(blob):
                    file, line = (
                        root / unquote(url.path.split(f"/blob/{ini['branch']}/", 1)[1]),
                        url.fragment.removeprefix('L'),
                    )
                    if not file.is_file():
                        wrong(f'{link} leads to a source that is not there')
                    elif line and not (line.isdigit() and int(line) <= len(file.read_text().splitlines())):
                        wrong(f'{link} leads to a line that is not there')
                if url.scheme or url.netloc or not (url.path or url.fragment):
                    continue
                path = (
                    (
                        out / url.path.lstrip('/')
                        if url.path.startswith('/')
                        else out / Path(name).parent / unquote(url.path)
                    ).resolve()
                    if url.path
                    else out.resolve() / name
                )
                if path.is_dir():
                    path = path / 'index.html'
                if not path.is_file() or not path.is_relative_to(out.resolve()):
                    wrong(f'{link} leads nowhere')
                elif (
                    url.fragment
                    and path.suffix == '.html'
                    and unquote(url.fragment) not in anchors[path.relative_to(out.resolve()).as_posix()]
                ):
                    wrong(f'{link} names an anchor that is not there')
        body = page.find('main') or page
        for e in body.find_all(['img', 'svg']):
            if not (e.get('alt') or e.get('aria-label') or '').strip():
                wrong(f'a figure in {(e.find_parent(id=True) or {}).get("id")} has no alt text')
        for e in body.find_all(['pre', 'code']):
            if re.search(r'^\s*#\|', e.get_text(), re.M):
                wrong(f'a directive is shown raw: {e.get_text().strip()[:60]!r}')
        if found := re.search(r'(?<![\w.~/])/(home|root|tmp|work|workspace|Users|var/folders)/[\w.]+', body.get_text()):
            wrong(f'shows the path of a machine: {found[0]}')
    return problems


def main(out=ROOT / '_docs'):
    if shutil.which('quarto'):
        subprocess.run(['quarto', 'render', str(ROOT)], check=True, env=os.environ | {'QUARTO_PYTHON': sys.executable})
    else:
        print(INSTALL)
        build_without_quarto(ROOT, out)
    front_door(out)
    problems = check(out)
    print(*problems, f'{len(sources(ROOT))} pages in {out.name}/, {len(problems)} problems', sep='\n')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
