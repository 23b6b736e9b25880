"""The study of reports/claims.ipynb.

`protocol`: arms and questions; `measures` and `times`: what is measured; `evidence`: the tables; `rules` and
`verdicts`: how each claim is judged; `run`: the command; `pages`: the notebooks that show the tables.
"""
