"""The notebooks of reports/ that show the tables, as HTML pages."""

from pathlib import Path
from tqdm import tqdm
from slotnb.report import render_notebook

NOTEBOOKS = tuple(
    f'reports/{n}.ipynb'
    for n in ('claims', 'collapse', 'slots', 'temperatures', 'features', 'uncertainty', 'materials')
)
# notebook: the question whose arms it shows; the others show `base`
_SHOWS = dict(collapse='collapse', slots='slots', temperatures='temperature', features='features')


def pages_of(
    only: tuple[str, ...],  # questions; empty is all
) -> tuple[str, ...]:  # notebooks
    "The notebooks that have something to show for these questions."
    return tuple(n for n in NOTEBOOKS if not only or _SHOWS.get(Path(n).stem, 'base') in ('base', *only))


def build_pages(
    out: str | Path,  # folder with the tables of `run.measure_claims`
    pages: str | Path = 'reports/_build',  # gets one HTML file per notebook
    notebooks: tuple[str, ...] = NOTEBOOKS,
    show_progress: bool = True,
) -> list[Path]:  # the pages
    "Execute the notebooks on the tables."
    results = dict(results=str(Path(out).resolve()))
    return [
        render_notebook(n, Path(pages) / f'{Path(n).stem}.html', results)
        for n in tqdm(notebooks, 'pages', disable=not show_progress)
    ]
