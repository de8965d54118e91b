"""A small made-up log in the layout of the published MovieLens-100K: its files, delimiters, encoding and README."""

from pathlib import Path

import numpy as np

_GENRES = """unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror
Musical Mystery Romance Sci-Fi Thriller War Western"""
GENRES = tuple(_GENRES.split())
_JOBS = ("administrator", "artist", "doctor", "writer", "student", "other")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_README = """SUMMARY
=============================================
u.data     -- The full u data set. Each user has rated at least 20 movies. This is a tab separated list of
\t         user id | item id | rating | timestamp.
              The time stamps are unix seconds since 1/1/1970 UTC

u.info     -- The number of users, items, and ratings in the u data set.

u.item     -- Information about the items (movies); this is a tab separated list of
              movie id | movie title | release date | video release date |
              IMDb URL | unknown | Action | Adventure | Animation |
              Children's | Comedy | Crime | Documentary | Drama | Fantasy |
              Film-Noir | Horror | Musical | Mystery | Romance | Sci-Fi |
              Thriller | War | Western |
              The last 19 fields are the genres, a 1 indicates the movie is of that genre.

u.genre    -- A list of the genres.

u.user     -- Demographic information about the users; this is a tab separated list of
              user id | age | gender | occupation | zip code
              The user ids are the ones used in the u.data data set.
"""


def write_movielens(folder: Path, *, rows: int, users: int = 30, items: int = 40, readme: bool = True) -> Path:
    """Write the folder, with the splits and other files that lie in the published one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    user, item = rng.integers(1, users + 1, rows), rng.integers(1, items + 1, rows)
    liked = rng.normal(size=items + 1)[item] + rng.normal(size=users + 1)[user] / 2
    rating = np.clip(np.round(3.4 + liked), 1, 5).astype(int)
    time_s = 874_724_710 + rng.integers(0, 18_000_000, rows)
    ratings = [f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in zip(user, item, rating, time_s, strict=True)]
    films, genres = [], rng.random((items + 1, len(GENRES))) < 0.12
    for k in range(1, items + 1):
        title = f"Caf\u00e9 {k}, The (1993)" if k == items else f"Film {k}, The ({1990 + k % 8})"
        date = "" if k == 5 else f"{1 + k % 28:02d}-{_MONTHS[k % 12]}-{1990 + k % 8}"
        url = f"http://us.imdb.com/M/title-exact?Film%20{k}%20({1990 + k % 8})"
        films.append("|".join([str(k), title, date, "", url, *map(str, genres[k].astype(int))]) + "\n")
    texts = {
        "u.data": "".join(ratings),
        "u.item": "".join(films),
        "u.user": "".join(
            f"{k}|{7 + 13 * k % 66}|{'MF'[k % 2]}|{_JOBS[k % 6]}|{10_007 * k % 99_999:05d}\n"
            for k in range(1, users + 1)
        ),
        "u.info": f"{users} users\n{items} items\n{rows} ratings\n",
        "u.genre": "".join(f"{name}|{k}\n" for k, name in enumerate(GENRES)) + "\n",
        "u.occupation": "\n".join(_JOBS) + "\n",
        "mku.sh": "#!/bin/sh\ntrap `rm -f tmp.$$; exit 1`  1 2 15\n",
        "allbut.pl": "#!/usr/local/bin/perl\n# get args\n",
    }
    for k in range(1, 3):
        texts[f"u{k}.base"], texts[f"u{k}.test"] = "".join(ratings[: rows * 4 // 5]), "".join(ratings[rows * 4 // 5 :])
    if readme:
        texts["README"] = _README
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder
