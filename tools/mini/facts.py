"""Questions about countries, cities, chemical elements and films, and their numbers as tables."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools.mini.corpus import Part, Row, fraction_of, identity, split_of
from tools.mini.names import Names, plain_words
from tools.mini.packages import Packages

CONTINENTS = {
    "AF": ("Africa", "非洲"), "AS": ("Asia", "亚洲"), "EU": ("Europe", "欧洲"), "NA": ("North America", "北美洲"),
    "OC": ("Oceania", "大洋洲"), "SA": ("South America", "南美洲"), "AN": ("Antarctica", "南极洲"),
}  # fmt: skip
# The Chinese characters of the elements from hydrogen on.
ELEMENTS = (
    "氢氦锂铍硼碳氮氧氟氖钠镁铝硅磷硫氯氩钾钙钪钛钒铬锰铁钴镍铜锌镓锗砷硒溴氪铷锶钇锆铌钼锝钌铑钯银镉铟锡锑碲碘氙铯钡镧铈镨钕"
    "钷钐铕钆铽镝钬铒铥镱镥铪钽钨铼锇铱铂金汞铊铅铋钋砹氡钫镭锕钍镤铀镎钚镅锔锫锎锿镄钔锘铹𬬻𬭊𬭳𬭛𬭶鿏𫟼𬬭鿔鿭𫓧镆𫟷鿬鿫"
)
PHASES = {"g": ("a gas", "气体"), "l": ("a liquid", "液体"), "s": ("a solid", "固体")}
LARGEST_CITIES = 4000
HELD_OUT = 0.25  # of the facts: one of their wordings is tested


@dataclass(frozen=True)
class Fact:
    """Something that is so, with questions for it in English and in Chinese; `{name}` is what they are about."""

    key: str
    subject: tuple[str, str | None]
    answer: tuple[str, str | None]
    english: Sequence[str]
    chinese: Sequence[str]


def fact_rows(fact: Fact, package: str) -> Iterator[Row]:
    """A row for each wording. Of a part of the facts one wording is tested: the others have trained the fact."""
    wordings = [(template, 0) for template in fact.english]
    if fact.subject[1] and fact.answer[1]:
        wordings += [(template, 1) for template in fact.chinese]
    tested = int(fraction_of("wording", fact.key) * len(wordings))
    held_out = split_of("fact", fact.key, test=HELD_OUT, validation=0.03) if len(wordings) > 1 else "train"
    for index, (template, side) in enumerate(wordings):
        language = ("en", "zh")[side]
        question, answer = template.format(name=fact.subject[side]), fact.answer[side]
        yield {
            "id": f"fact/{fact.key}/{index}",
            **identity(package),
            "split": held_out if index == tested else "train",
            "extra": {f"ask_{language}": question, f"reply_{language}": answer},
        }


def countries(packages: Packages) -> Iterator[Row]:
    """Capital, continent, currency and code of each country, asked in several words."""
    names = Names(packages)
    chinese = names.territories
    cities, currencies = names.cities(), names.currencies()
    for entry in _countries(packages):
        name = (entry["name"], chinese[entry["name"]])
        continent = CONTINENTS[entry["continentcode"]]
        capital = entry["capital"]
        facts = [
            Fact("continent", name, continent, ("Which continent is {name} in?", "{name} belongs to which continent?"),
                 ("{name}在哪个洲？", "{name}属于哪个洲？")),
            Fact("capital", name, (capital, cities.get(capital)),
                 ("What is the capital of {name}?", "Name the capital of {name}."), ("{name}的首都是哪里？",)),
            Fact("country", (capital, cities.get(capital)), name,
                 ("Which country has the capital {name}?", "{name} is the capital of which country?"),
                 ("{name}是哪个国家的首都？",)),
        ]  # fmt: skip
        currency = currencies.get(entry["currencycode"])
        if currency is not None:
            asked = ("What is the currency of {name}?", "How does one pay in {name}?")
            facts.append(Fact("currency", name, currency, asked, ("{name}的货币是什么？", "在{name}用什么货币？")))
        for fact in facts:
            if fact.subject[0] and fact.answer[0]:
                named = Fact(f"{entry['iso']}/{fact.key}", fact.subject, fact.answer, fact.english, fact.chinese)
                yield from fact_rows(named, "geonames")


def _countries(packages: Packages) -> Iterator[dict[str, Any]]:
    """The countries of GeoNames that the CLDR names, under their names there."""
    file = next(packages.folder("geonames").rglob("data/countries.json"))
    known = {tuple(plain_words(name)): name for name in Names(packages).territories}
    for entry in json.loads(file.read_text(encoding="utf-8")).values():
        name = known.get(tuple(plain_words(entry["name"])))
        if name is not None and entry["population"] > 0 and entry["continentcode"] in CONTINENTS:
            yield {**entry, "name": name}


def country_table(packages: Packages) -> Iterator[Row]:
    """Area, population and neighbours of countries; a tenth of the countries is tested."""
    chinese = Names(packages).territories
    for entry in _countries(packages):
        name, continent = entry["name"], CONTINENTS[entry["continentcode"]]
        if entry["areakm2"] > 0:
            yield {
                "id": f"country/{entry['iso']}",
                **identity("geonames"),
                "split": split_of("country", name),
                "text_en": f"{name}, {continent[0]}",
                "text_zh": f"{chinese[name]}，{continent[1]}",
                "label": continent[0],
                "label_zh": continent[1],
                "numbers": {
                    "area in km2": float(entry["areakm2"]),
                    "population": float(entry["population"]),
                    "neighbours": float(len([code for code in entry["neighbours"].split(",") if code])),
                },
            }


def cities(packages: Packages) -> Iterator[Row]:
    """Position and people of the largest cities; a tenth of the cities is tested."""
    file = next(packages.folder("geonames").rglob("data/cities15000.json"))
    entries = sorted(json.loads(file.read_text(encoding="utf-8")).values(), key=lambda city: -city["population"])
    countries = {entry["iso"]: entry["name"] for entry in _countries(packages)}
    names = Names(packages)
    known = names.cities()
    taken: Counter[str] = Counter()
    for city in entries[:LARGEST_CITIES]:
        country = countries.get(city["countrycode"])
        name = " ".join(plain_words(city["name"])).title()
        key = f"{name}, {country}"
        taken[key] += 1
        if country is None or not name or taken[key] > 1:
            continue
        translated = known.get(city["name"])
        yield {
            "id": f"city/{city['geonameid']}",
            **identity("geonames"),
            "split": split_of("city", key),
            "text_en": key,
            "text_zh": f"{names.territories[country]}{translated}" if translated else None,
            "label": country,
            "label_zh": names.territories[country],
            "numbers": {
                "latitude": float(city["latitude"]),
                "longitude": float(city["longitude"]),
                "people": float(city["population"]),
            },
        }


def _elements(packages: Packages) -> list[sqlite3.Row]:
    connection = sqlite3.connect(next(packages.folder("mendeleev").rglob("elements.db")))
    connection.row_factory = sqlite3.Row
    query = """
        select e.*, s.name as series, p.melting_point as melting, p.boiling_point as boiling
        from elements e left join series s on s.id = e.series_id
        left join (select atomic_number, max(melting_point) as melting_point, max(boiling_point) as boiling_point
                   from phasetransitions group by atomic_number) p on p.atomic_number = e.atomic_number
        order by e.atomic_number"""
    return connection.execute(query).fetchall()


def elements(packages: Packages) -> Iterator[Row]:
    """Symbol, number, and state at room temperature of the elements, asked in several words and both directions."""
    for entry in _elements(packages):
        number, symbol, english = entry["atomic_number"], entry["symbol"], entry["name"].lower()
        name = (english, ELEMENTS[number - 1])
        state = _state(entry)
        facts = [
            Fact("symbol", name, (symbol, symbol), ("What is the symbol of {name}?", "Chemical symbol: {name}"),
                 ("{name}的元素符号是什么？", "元素符号：{name}")),
            Fact("name", (symbol, symbol), name, ("Which element is {name}?", "The element with the symbol {name}:"),
                 ("{name}是什么元素？", "符号{name}代表哪种元素？")),
            Fact("number", name, (str(number), str(number)),
                 ("What is the atomic number of {name}?", "Atomic number: {name}"), ("{name}的原子序数是多少？",)),
            Fact("numbered", (str(number), str(number)), name, ("Which element has the atomic number {name}?",),
                 ("原子序数{name}是什么元素？", "第{name}号元素是什么？")),
        ]  # fmt: skip
        if state is not None:
            facts.append(Fact("state", name, state, ("Is {name} a solid, a liquid or a gas at room temperature?",),
                              ("{name}在室温下是什么状态？",)))  # fmt: skip
        for fact in facts:
            named = Fact(f"{symbol}/{fact.key}", fact.subject, fact.answer, fact.english, fact.chinese)
            yield from fact_rows(named, "mendeleev")


def _state(entry: sqlite3.Row) -> tuple[str, str] | None:
    """The state at 25 °C; the melting and boiling points are in kelvins."""
    limit = 298.15
    if entry["boiling"] is not None and entry["boiling"] < limit:
        return PHASES["g"]
    if entry["melting"] is None:
        return None
    return PHASES["l"] if entry["melting"] < limit and entry["boiling"] is not None else PHASES["s"]


def element_table(packages: Packages) -> Iterator[Row]:
    """Weight, density, radius and melting point of the elements; a tenth of the elements is tested."""
    columns = {
        "atomic number": "atomic_number", "atomic weight": "atomic_weight", "density": "density",
        "atomic radius": "atomic_radius", "electronegativity": "en_pauling", "melting point in K": "melting",
        "boiling point in K": "boiling", "period": "period", "group": "group_id",
    }  # fmt: skip
    for entry in _elements(packages):
        numbers = {name: float(entry[column]) for name, column in columns.items() if entry[column] is not None}
        yield {
            "id": f"element/{entry['symbol']}",
            **identity("mendeleev"),
            "split": split_of("element", entry["symbol"]),
            "text_en": entry["name"].lower(),
            "text_zh": ELEMENTS[entry["atomic_number"] - 1],
            "label": entry["name"].lower(),
            "label_zh": ELEMENTS[entry["atomic_number"] - 1],
            "numbers": numbers,
            "categories": {"series": entry["series"].lower()} if entry["series"] else None,
        }


FIRST_YEAR = 1920


def films(packages: Packages) -> Iterator[Row]:
    """Films with director, genre, country, year and length; those of a tenth of the directors are tested."""
    connection = sqlite3.connect(next(packages.folder("bokeh").rglob("movies.db")))
    query = "select ID, Title, Year, Runtime, Genre, Director, Country, Language from omdb order by ID"
    for number, title, year, minutes, genre, director, country, language in connection.execute(query):
        if not (title and year and director and genre and year >= FIRST_YEAR) or len(title) > 60:
            continue
        director = director.split(",")[0].strip()
        yield {
            "id": f"film/{number}",
            **identity("bokeh"),
            "split": split_of("director", director),
            "text_en": f"{title}, a film by {director}",
            "label": director,
            "numbers": {"year": float(year)} | ({"minutes": float(minutes)} if minutes else {}),
            "categories": {
                "genre": genre.split(",")[0].strip(),
                **({"country": country.split(",")[0].strip()} if country else {}),
                **({"language": language.split(",")[0].strip()} if language else {}),
            },
        }


GEONAMES = ("geonames", "cldr", "emojibase")
PARTS = {
    "countries": Part(countries, GEONAMES),
    "country_table": Part(country_table, GEONAMES),
    "cities": Part(cities, GEONAMES),
    "elements": Part(elements, ("mendeleev",)),
    "element_table": Part(element_table, ("mendeleev",)),
    "films": Part(films, ("bokeh",)),
}
