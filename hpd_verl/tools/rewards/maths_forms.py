r"""The structure of a maths answer: lists, sets, tuples, relations, matrices, letters, words, and single values.

Characters that stand for things LaTeX writes in several ways: ``«word»`` a word, ``⦃ ⦄`` the braces of a set, ``⟨ ⟩``
angle brackets, ``¤`` a currency, ``⏎`` the end of a matrix's row.
"""

# ruff: noqa: RUF001, SIM905 (answers hold such characters; lists of words are read best as text)

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi infty min max gcd lcm frac "
    "alpha beta gamma theta lambda omega phi sigma".split()
)
"""Names that are no words, also without a backslash."""
UNITS = {
    **{
        name: (dimension, factor)
        for dimension, factor, names in (
            ("length", 1.0, "m meter metre"),
            ("length", 1e-2, "cm centimeter centimetre"),
            ("length", 1e-3, "mm millimeter millimetre"),
            ("length", 1e3, "km kilometer kilometre"),
            ("length", 0.3048, "ft foot feet"),
            ("length", 0.0254, "in inch inche"),
            ("length", 0.9144, "yd yard"),
            ("length", 1609.344, "mi mile"),
            ("mass", 1.0, "g gram gm"),
            ("mass", 1e3, "kg kilogram"),
            ("mass", 1e-3, "mg milligram"),
            ("mass", 453.59237, "lb pound"),
            ("mass", 28.349523125, "oz ounce"),
            ("time", 1.0, "s sec second"),
            ("time", 60.0, "min minute"),
            ("time", 3600.0, "h hr hour"),
            ("time", 86400.0, "day"),
            ("time", 604800.0, "week wk"),
            ("volume", 1.0, "l liter litre"),
            ("volume", 1e-3, "ml milliliter millilitre"),
            ("money", 1.0, "dollar usd buck"),
            ("money", 1e-2, "cent"),
            ("angle", 1.0, "degree deg"),
            ("power", 1.0, "w watt"),
            ("energy", 1.0, "j joule"),
            ("force", 1.0, "n newton"),
            ("voltage", 1.0, "v volt"),
            ("speed", 1.0, "mph"),
        )
        for name in names.split()
    }
}
"""Units of which one is not another: their dimension and size."""
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"万": 10**4, "亿": 10**8, "千": 10**3, "百": 10**2}
_BASES = {
    name: f"_{{{base}}}"
    for base, name in enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2)
} | {"sixteen": "_{16}"}
_SHORT_WORDS = frozenset("yes no odd any all one two six ten day new old red dne nan way car dog cat men boy".split())
_DATES = frozenset("Jan Feb Mar Apr May Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Wed Thu Fri Sat Sun".split())
_SHORT_UNITS = frozenset(
    "cm mm km ft in kg mg gm lb lbs oz sec min hr hrs ml mi yd mph kmh kph cc am pm usd pct rs".split()
)
_JOINING = frozenset("and or 或 或者 和 及 以及 与 и или und oder et ou".split())
_UNIT_FRACTION = re.compile(
    r"(?<=[\d}\s])\\frac\s*\{\s*(?:[mgslLN]|[ckm]m|kg|mi|ft)\s*\}\s*\{\s*(?:[smhgL]|min|hr|[ck]m)(?:\s*\^\s*\{?\d\}?)?\s*\}"
)
_NEGATING = re.compile(
    r"«(?:not|never|cannot|except|excluding|neither|nor|without|isn't|isn|aren't|doesn't|isnt|不|不是|不等于|不为|非|除|除了|не|nicht|kein)»"
    r"|«other»\s*«than»|\\neg\b|\\lnot\b"
)
_BOUNDING = {
    ">=": re.compile(r"«at»\s*«least»|«no»\s*«(?:less|fewer)»\s*«than»|«(?:至少|不少于|以上)»"),
    "<=": re.compile(r"«at»\s*«most»|«no»\s*«more»\s*«than»|«up»\s*«to»|«(?:至多|最多|不超过|以下)»"),
    ">": re.compile(r"«(?:more|greater|larger|bigger|higher)»\s*«than»|«(?:大于|超过|多于)»"),
    "<": re.compile(r"«(?:less|fewer|smaller|lower)»\s*«than»|«(?:小于|少于|不到)»"),
}

_CHARACTERS = str.maketrans(
    {
        **{chr(0xFF01 + code): chr(0x21 + code) for code in range(94)},  # full width
        **dict.fromkeys("−–—‐‑", "-"),
        **dict.fromkeys("⋅·∙", "\\cdot "),
        **dict.fromkeys("÷∕", "/"),
        **dict.fromkeys("≤⩽", "\\le "),
        **dict.fromkeys("≥⩾", "\\ge "),
        **dict.fromkeys("∅", "\\emptyset "),
        **dict.fromkeys("\u00a0\u2009\u202f\u3000\t\r\n", " "),
        **dict.fromkeys("【】", " "),
        **dict.fromkeys('\u200b\u200e\u200f\u202a\u202c\u202e\ufeff\0“”"`', ""),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("、", ","),
        **dict.fromkeys("。", "."),
        **dict.fromkeys("€£¥₹₽₩", "¤"),
        **{"×": "\\times ", "≠": "\\ne ", "≈": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∞": "\\infty ", "π": "\\pi "},
        **{"°": "^\\circ ", "…": "\\ldots ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∉": "\\notin "},
        **{"ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "¢": " cents"},
        **{
            name: f"\\frac{{{over}}}{{{under}}}"
            for name, over, under in zip("½⅓⅔¼¾⅕⅛", "1121311", "2334458", strict=True)
        },
        **{each: f"^{{{digit}}}" for digit, each in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{each: f"_{{{digit}}}" for digit, each in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    }
)
_TEXT = re.compile(
    r"\\(text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathsf|mathtt|mathit|mbox|hbox|emph|operatorname\*?"
    r"|mathbf|boldsymbol|bm|underline|boxed|fbox)\s*\{([^{}]*)\}"
)
_SYMBOLIC = frozenset({"mathbf", "boldsymbol", "bm", "mathit", "underline", "boxed", "fbox"})
_LETTERS = r"[^\W\d_]"
_RUN = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[clr| ]*\})?|\\mathbb\{\w\}|\\[a-zA-Z]+"
    rf"|«[^»]*»|{_LETTERS}+(?:'{_LETTERS}+)?"
)
_SPACES = re.compile(r"\\(?:[,;:> ]|quad|qquad|enspace|thinspace|hfill)|~|\\hspace\{[^{}]*\}")
_NOTHING = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr|left|right|mleft|mright|middle|rm|bf|it)"
    r"(?![a-zA-Z])\.?|\\[!()\[\]]|(?<!\\)\$"
)
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:([ _'])\d{3})(?:\3\d{3})*)(?![\d_])")
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:«(?:st|nd|rd|th)»|(?:st|nd|rd|th)\b)\s*\}?")


@dataclass(frozen=True)
class Value:
    """One value: its LaTeX, the words beside it, whether it is a percent, and "not", "<", ">=" and so on before it."""

    tex: str
    words: tuple[str, ...] = ()
    percent: bool = False
    bound: str = ""


@dataclass(frozen=True)
class Words:
    """Text alone, or a letter of the alphabet's upper case."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The letter of one of several choices, and what stands behind it."""

    letter: str
    content: "Form | None" = None


@dataclass(frozen=True)
class Many:
    """Several: bare, where ``opening`` and ``closing`` are empty, a set, a tuple or an interval."""

    items: "tuple[Form, ...]"
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Union:
    """Of sets."""

    items: "tuple[Form, ...]"


@dataclass(frozen=True)
class Relation:
    """A chain ``sides[0] operators[0] sides[1] ...``."""

    operators: tuple[str, ...]
    sides: "tuple[Form, ...]"


@dataclass(frozen=True)
class Matrix:
    """Rows, and whether bars stand around them."""

    rows: "tuple[tuple[Form, ...], ...]"
    determinant: bool


class Dots(NamedTuple):
    """And so on."""


Form = Value | Words | Choice | Many | Union | Relation | Matrix | Dots


def clean(text: str) -> str:
    """One spelling for one thing; words in text macros are marked."""
    if not text.isascii():  # vowels of some scripts are marks and no letters
        text = "".join(each for each in unicodedata.normalize("NFC", text) if unicodedata.category(each)[0] != "M")
    text = text.translate(_CHARACTERS)
    text = re.sub(r"(?<=[\w)}])(?:\*\*|\s\*\*\s)(?=[\w({-])", "^", text).replace("**", "")  # a power, else bold type
    text = re.sub(r"^\s*_{2,}([^_].*?)_{2,}\s*$", r"\1", text)
    if "matrix" in text or "array" in text or "cases" in text:
        text = re.sub(r"\\\\(?:\[[^\]]*\])?", "⏎", text)
    else:
        text = re.sub(r"\\\\(?=[a-zA-Z{}%$,])", r"\\", text).replace("\\\\", " ")
    text = re.sub(r"\\n(?:eq?)(?![a-zA-Z])|\\not\s*=|!=", r"\\ne ", text)
    text = re.sub(r"\\not\s*\\in(?![a-z])", r"\\notin ", text)
    text = re.sub(r"\\\s*$", "", text)  # of a space at the end
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text)
    text = re.sub(r"^\s*\*([^*]+)\*\s*$", r"\1", text)
    text = re.sub(r"\\degrees?(?![a-zA-Z])", r"^\\circ ", text)
    text = text.replace(r"\$", "¤").replace(r"\%", "%").replace(r"\&", "&").replace(r"\#", " ")
    text = re.sub(r"\\(?:pounds|euro|yen|textdollar)(?![a-zA-Z])", "¤", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2:  # one alone is money
        text = re.sub(r"(?<!\\)\$(?=\s?\.?\d)", "¤", text, count=1)
    text = _NOTHING.sub("", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", "_", text).replace("{,}", ",")
    text = re.sub(r"\\pmod\s*(\{[^{}]*\}|\d)|\(\s*\\?b?mod\s+(\d+)\s*\)", "«modulo»", text)
    text = re.sub(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))|(?<=\d)~(?=\d{3}(?!\d))", "_", text)
    text = _SPACES.sub(" ", text)
    text = re.sub(r"(?<![\d.])\d{1,3}(?:\.\d{3}){2,}(?![\d.])", lambda found: found[0].replace(".", ""), text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"\\mathbb\s+(\w)", r"\\mathbb{\1}", text)
    text = re.sub(r"\\_|(?<![\w}])_{2,}(?!\w)", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:ldots|dots|cdots|dotsc|dotsb|vdots)(?![a-zA-Z])|\.{3,}", r"\\ldots ", text)
    text = re.sub(r"\\(?:lbrace|\{)", "⦃", text)
    text = re.sub(r"\\(?:rbrace|\})", "⦄", text)
    text = re.sub(r"\\(?:lor|vee)(?![a-zA-Z])", " «or» ", text)
    text = re.sub(r"\\(?:land|wedge)(?![a-zA-Z])", " «and» ", text)
    text = re.sub(r"\\langle(?![a-zA-Z])", "⟨", text)
    text = re.sub(r"\\rangle(?![a-zA-Z])", "⟩", text)
    text = re.sub(r"\\l?vert(?![a-zA-Z])|\\rvert(?![a-zA-Z])", "|", text)
    text = re.sub(r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset ", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    for _ in range(4):
        text, count = _TEXT.subn(_unwrapped, text)
        if not count:
            break
    return text


def _unwrapped(match: re.Match[str]) -> str:
    macro, content = match[1], match[2]
    if macro in _SYMBOLIC or (macro == "mathrm" and content.strip() in ("e", "i", "d")):
        return f"{content} " if macro in ("boxed", "fbox") else content
    if macro.startswith("operatorname") and content.strip() in FUNCTIONS:
        return f"\\{content.strip()} "
    marked = _RUN.sub(lambda run: run[0] if run[0][0] in "\\«" else f"«{run[0]}»", content)
    return f" {marked} " if macro.startswith(("text", "mbox", "hbox", "emph")) else marked


def mark_words(text: str, numeric: bool) -> str:
    """Words outside of text macros are marked too; functions get their backslash.

    Args:
        text: as ``clean`` gives it.
        numeric: whether it can only be a number, so that every run of letters is a word.
    """

    def marked(match: re.Match[str]) -> str:
        run = match[0]
        if run[0] in "\\«":
            return run
        lower = run.lower()
        if lower in _JOINING or run in _DATES or not run.isascii():
            return f"«{run}»"
        if run in FUNCTIONS:
            return f"\\{run} "
        if lower in ("infinity", "inf"):
            return "\\infty "
        if len(run) == 1 or (run.isupper() and not numeric):
            return run
        before = text[: match.start()].rstrip()[-1:]
        of_number = before.isdigit() or before in ("}", "%", "¤") or text[match.start() - 1 : match.start()] == " "
        wordlike = len(run) >= 4 and bool(re.search("[aeiouyAEIOUY]", run))
        if numeric or wordlike or lower in _SHORT_WORDS or (lower in _SHORT_UNITS and of_number) or "'" in run:
            return f"«{run}»"
        return run

    text = _RUN.sub(marked, text)
    text = re.sub(r"^(.*)«or»\s*«(?:more|greater|above|larger)»", r"«at»«least»\1", text)
    text = re.sub(r"^(.*)«or»\s*«(?:less|fewer|below|smaller)»", r"«at»«most»\1", text)
    text = re.sub(r"«(?i:minus|negative|负)»\s*(?=[\d.¤(]|\\(?:frac|sqrt|pi))", "-", text)
    # An article, and the letter of a unit that stands behind a number.
    text = re.sub(r"(?<![\w\\])[aA]\s+(?=«(?!(?:and|or)»))", " ", text)
    if numeric:
        text = _UNIT_FRACTION.sub("«per»", text)
        text = re.sub(
            r"(?<=[\d})])(\s*)([mgshLlNJWVK])(?=\s*(?:\^\s*\{?[23]\}?\s*)?(?:/\s*\S+\s*)?[.]?\s*$)", r"\1«\2»", text
        )
        text = re.sub(r"(?<=\\circ)(\s*)([CFK])(?=[.]?\s*$)", r"\1«\2»", text)
        text = re.sub(r"(?<=»)\s*/\s*([mgshLl])(?![a-zA-Z])", r"/«\1»", text)
    return text


# Splitting

_TOKEN = re.compile(r"«[^»]*»|\\(?:begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.|.", re.S)
_OPENING, _CLOSING = "([{⦃⟨", ")]}⦄⟩"
_SEPARATOR = re.compile(r"\s*(?:[,;]\s*)?«(?i:and|or|或|或者|和|及|以及|与|и|или|und|oder|et|ou)»[\s,]*|\s*[,;]\s*")
_OUTWARD = re.compile(r"(?=\]|.*\[$)([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])", re.S)
_COMMA = re.compile(r"\s*[,;]\s*")
_UNION = re.compile(r"\\(?:big)?cup(?![a-zA-Z])")
_SIGNS = {
    "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "<=": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=",
    ">=": ">=", "<": "<", "\\lt": "<", ">": ">", "\\gt": ">", "=": "=", "\\equiv": "=", "\\ne": "!=",
    "\\approx": "~", "\\simeq": "~", "\\in": "in", "\\notin": "not in",
}  # fmt: skip
_RELATION = re.compile(
    r"\\(?:leqslant|leq|le|geqslant|geq|ge|lt|gt|equiv|ne|approx|simeq|notin|in)(?![a-zA-Z])|<=|>=|[<>=]"
)
_ROW, _CELL = re.compile("⏎"), re.compile("&")


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts between separators outside of all brackets, and the separators."""
    parts, found, depth, start, position = [], [], 0, 0, 0
    while position < len(text):
        if depth <= 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position])
            found.append(match[0].strip())
            position = start = match.end()
            continue
        token = _TOKEN.match(text, position)
        assert token is not None
        depth += token[0] in _OPENING or token[0].startswith("\\begin")
        depth -= token[0] in _CLOSING or token[0].startswith("\\end")
        position = token.end()
    parts.append(text[start:])
    return parts, found


def enclosed(text: str) -> tuple[str, str, str] | None:
    """The opening bracket, what is inside and the closing bracket of a text that is one bracket; else None."""
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return None
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += token[0] in _OPENING
        depth -= token[0] in _CLOSING
        if depth == 0:
            return (text[0], text[1:-1], text[-1]) if token.end() == len(text) else None
    return None


# Reading

_LEAD_IN = re.compile(
    r"^\s*(?:«?(?:so|thus|therefore|hence|the|my|our|correct|final|solution|result|answer|answers|option|choice|is|are|would|be|it|最终"
    r"|答案|答|选项|选择|选|正确|是|为|因此|所以|故|ответ|réponse|respuesta|antwort|resposta|risposta|정답|답|答え)»?[\s:,=]+)+"
    r"|^\s*«?(?:答案|答|选项|选择|选|故选|应选|故选择|应选择)»?(?:«?[是为]»?)?\s*:?\s*",
    re.I,
)
_CHOSEN = re.compile(
    r"^\s*(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[).:](?!\d)|([A-Z])(?=\s+\(?[\d\\¤-]|\s*,\s*(?!and|or)[a-z]{2,})),?\s*(.*)$",
    re.S,
)
_OTHERWISE = re.compile(r"[,;=<>+*/^_]|-\s*[A-Z(]|\\(?:cup|cap|in|times|cdot)\b|(?:and|or)\b")
_WORD = re.compile(r"«([^»]*)»")
_UNIT = re.compile(r"(?:/\s*)?«[^»]*»(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?(?:\s*[.](?=\s*«))?")


def read(text: str, numeric: bool, thousands: bool = True) -> Form:
    """The structure of an answer.

    Args:
        text: LaTeX or plain, without a box.
        numeric: whether what it is compared with is a bare number: all words are words then.
        thousands: read ``1,234`` as one number, not as two.
    """
    text = clean(text)
    plain = re.sub(r"[«»]", "", text).strip().strip(".").strip()
    if numeric:
        number = _LEAD_IN.sub("", plain)
        spelled = _spelled(number) if number.isascii() else _spelled_in_chinese(number)
        if spelled is not None:
            return Value(spelled)
    if found := _chosen(plain, numeric):
        return found
    return _read(mark_words(text, numeric), numeric, thousands)


_ONES = {
    name: number
    for number, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    name: 10 * number
    for number, name in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}


def _spelled(text: str) -> str | None:
    """The digits of a number in English words, before whatever it counts; None for other text."""
    if re.search(r"[^A-Za-z\s,'-]", text):
        return None
    words = re.findall(r"[a-z]+", text.lower())
    total = current = position = 0
    for position, word in enumerate([*words, ""]):
        if word in _ONES and current % 10 == 0 and (current % 100 == 0 or (current % 100 >= 20 and _ONES[word] < 10)):
            current += _ONES[word]
        elif word in _TENS and current % 100 == 0:
            current += _TENS[word]
        elif word == "hundred" and 0 < current < 10:
            current *= 100
        elif word in _SCALES and 0 < current < 1000:
            total, current = total + current * _SCALES[word], 0
        elif not (word == "and" and position and set(words[position + 1 : position + 2]) & {*_ONES, *_TENS}):
            break
    rest = words[position:]
    part = _PARTS.get(rest[0].removesuffix("s")) if rest else None
    numbers = {*_ONES, *_TENS, *_SCALES, *_JOINING, "minus", "not", "than", "to", "half", "halves"}
    if (not position and part != 2) or numbers & set(rest[part is not None :]):
        return None
    return str(total + current) if part is None else f"{total + current if position else 1}/{part}"


_DIGITS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_CHINESE = re.compile(r"([零〇一二两三四五六七八九十百千万亿]+)[个只元人天年月岁米种次条本张块页名位倍厘]{0,3}")


def _spelled_in_chinese(text: str) -> str | None:
    """The digits of a number in Chinese, before what it counts; None for other text."""
    match = _CHINESE.fullmatch(text)
    if match is None:
        return None
    if set(match[1]) <= set(_DIGITS):
        return "".join(str(_DIGITS[each]) for each in match[1])
    total = section = digit = 0
    for each in match[1]:
        if each in _DIGITS:
            if digit:
                return None
            digit = _DIGITS[each]
        elif each in "万亿":
            total, section, digit = (total + section + digit) * _SCALES[each], 0, 0
        else:
            section, digit = section + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[each], 0
    return str(total + section + digit)


def _chosen(plain: str, numeric: bool) -> Choice | None:
    """A choice's letter, which may have a lead-in and the choice's content beside it."""
    rest = _LEAD_IN.sub("", plain).strip()
    if re.fullmatch(r"\(?\s*[A-Z]\s*\)?", rest):
        return Choice(rest.strip("() "))
    if match := re.match(r"\(?\s*([A-Z])\s*\)?\s+is\s+(?:the\s+)?(?:correct|right|answer|best)\b", rest):
        return Choice(match[1])
    if len(set(re.findall(r"\(\s*([A-Z])\s*\)", rest))) > 1:
        return None
    if (match := re.match(r"([^A-Za-z]*\d[^A-Za-z]*)\s\(([A-Z])\)$", rest)) is not None:
        return Choice(match[2], read(match[1], numeric))
    match = _CHOSEN.match(rest)
    if match is None or not match[4].strip() or _OTHERWISE.match(match[4]):
        return None
    content = match[4].strip().strip(":")
    return Choice(match[1] or match[2] or match[3], read(content, numeric) if content else None)


def _read(text: str, numeric: bool, thousands: bool) -> Form:
    text = text.strip()
    while text[-1:] in (".", ";", ",", ":") or text[:1] in (",", ";", ":"):
        text = text.strip(",;: ").rstrip(". ")
    if text == "\\ldots":
        return Dots()
    if thousands:
        text = _join_thousands(text)
    if found := _OUTWARD.fullmatch(text):  # ]1,2[, as some countries write an open interval
        text = f"{'(' if found[1] == ']' else '['}{found[2]}{')' if found[3] == '[' else ']'}"
    parts, _ = split(text, _UNION)
    if len(parts) > 1:
        return Union(tuple(_read(part, numeric, False) for part in parts))
    parts, _ = split(text, _SEPARATOR)
    if len(parts) > 1:
        items = [_read(part, numeric, thousands) for part in parts if part.strip(" .")]
        if numeric and len(items) > 1:  # what is said beside it
            items = [item for item in items if not isinstance(item, Words) or len(item.text) == 1] or items
        return items[0] if len(items) == 1 else Many(tuple(items))
    if (matrix := _matrix(text, numeric)) is not None:
        return matrix
    brackets = enclosed(text)
    if brackets is not None:
        opening, inside, closing = brackets
        if opening == "{" and (len(split(inside, _COMMA)[0]) == 1 or _COMMAS.fullmatch(inside.strip())):
            return _read(inside, numeric, thousands)
        if opening == "{":  # as a set is written without LaTeX
            opening, closing = "⦃", "⦄"
        if opening == "⦃" and len(halves := split(inside, re.compile(r"\||\\mid(?![a-z])|:"))[0]) == 2:
            return _read(halves[1], numeric, False)
        items_of, _ = split(inside, _COMMA)
        if opening == "⦃" and closing == "⦄":
            return Many(tuple(_read(item, numeric, False) for item in items_of if item.strip()), "⦃", "⦄")
        if len(items_of) > 1:
            return Many(tuple(_read(item, numeric, False) for item in items_of), opening, closing)
        if opening in "([" and (opening, closing) in (("(", ")"), ("[", "]")):
            return _read(inside, numeric, thousands)
    parts, signs = split(text, _RELATION)
    if len(parts) > 1:
        return _relation([part.strip() for part in parts], [_SIGNS[sign] for sign in signs], numeric)
    if numeric and (found := re.match(r"^(?:«[^»]*»\s*)+:\s*(.*)$", text, re.S)):
        return _read(found[1], numeric, thousands)
    return _value(text)


def _relation(parts: list[str], signs: list[str], numeric: bool) -> Form:
    sides = tuple(_read(part, numeric, True) for part in parts)
    if signs == ["in"]:
        return sides[1]
    if not parts[0] or (isinstance(sides[0], Words) and len(sides[0].text) > 1):  # "\ne 6", "Area = 5"
        if len(signs) == 1 and signs[0] in ("=", "~"):
            return sides[1]
        if len(signs) == 1 and isinstance(sides[1], Value) and not parts[0]:
            return Value(sides[1].tex, sides[1].words, sides[1].percent, "not" if signs[0] == "!=" else signs[0])
        if len(sides) > 2:
            return Relation(tuple(signs[1:]), sides[1:])
    return Relation(tuple(signs), sides)


def _join_thousands(text: str) -> str:
    """``1,234`` becomes ``1234``, but in brackets of which items are parted by commas."""
    pieces, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        change = (token[0] in "([⦃⟨") - (token[0] in ")]⦄⟩")
        if change and (depth == 0 or depth + change == 0):
            pieces.append(_without_commas(text[start : token.start()]) if depth == 0 else text[start : token.start()])
            start = token.start()
        depth += change
    return "".join(pieces) + (_without_commas(text[start:]) if depth == 0 else text[start:])


def _without_commas(text: str) -> str:
    return _COMMAS.sub(lambda found: found[0].replace(",", ""), text)


_MATRIX = re.compile(
    r"^[(\[|]?\s*\\begin\s*\{([pbBvV]?(?:small)?matrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\s*\{\1\}\s*[)\]|]?$", re.S
)


def _matrix(text: str, numeric: bool) -> Matrix | None:
    match = _MATRIX.match(text)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row for row in split(match[2], _ROW)[0] if row.strip()]
    read_rows = tuple(tuple(_read(cell, numeric, False) for cell in split(row, _CELL)[0]) for row in rows)
    return Matrix(read_rows, match[1] in ("vmatrix", "Vmatrix") or text[0] == "|")


def _value(text: str) -> Form:
    """A value with its words, or words alone."""
    bound = "not" if _NEGATING.search(text) else ""
    for sign, pattern in _BOUNDING.items():
        if not bound and pattern.search(text):
            bound, text = sign, pattern.sub(" ", text)
    text = re.sub(r"«(?:percent|percentage|pct)»(?:\s*«points?»)?|«per»\s*«cent»|%", "%", text, flags=re.I)
    percent = "%" in text
    text = text.replace("%", " ")
    text = _ORDINAL.sub("", text)
    currency = "¤" in text
    text = text.replace("¤", " ")
    if not re.search(r"[\d\\]", text) and _WORD.search(text) and not re.search(r"[=+*/^]", text):
        said = " ".join(re.sub(r"[«»(){}]", " ", text).split())
        return Words(said)
    text = re.sub(r"_\s*\{?\s*«(\w+)»\s*\}?", lambda found: _BASES.get(found[1].lower(), found[0]), text)
    scale = 1
    words = []
    for word in _WORD.findall(text):
        name = word.lower()
        if name in _SCALES and re.search(r"\d", text):
            scale *= _SCALES[name]
        else:
            words.append(name)
    # Words part numbers from one another: 3 apples 4 is no number, and neither is "12 of 20".
    text = _UNIT.sub("«»", text)
    text = re.sub(r"\\frac\s*\{[\s«»]*\}\s*\{[\s«»]*\}", "«»", text)
    text = re.sub(r"\(\s*(?:«»\s*)+\)|«»(?=\s*(?:[+*/)}-]|\\times|\\cdot))|(?<=[+*({-])\s*«»", " ", text)
    text = re.sub(r"^(?:\s|«»|\.(?!\d))+|(?:\s|«»|/|\\cdot(?![a-z]))+$", "", text)
    if "\\circ" in text and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])", text):
        text, degrees = re.subn(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))\s*", " ", text)
        words += ["degree"] * (degrees > 0 and not words)
    if currency and not any(word in ("cent", "cents", "dollar", "dollars") for word in words):
        words.append("dollar")
    text = _THOUSANDS.sub(lambda found: re.sub(r"[ _']", "", found[0]), text)
    text = " ".join(text.split())
    if scale > 1:
        text = f"{text}\\cdot {scale}"
    return Value(text, tuple(words), percent, bound)
