r"""Whether two maths answers are equal: exactly, by structure. ``docs/evaluation.md`` has the rules with examples.

math-verify's parser reads expressions. Its comparison rounds to six digits and ignores differences below 1e-15, so it
decides only about inequalities that are not an interval.
"""

# ruff: noqa: RUF001 (answers hold such characters)

import itertools
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from hpd_verl.tools.rewards.maths_forms import (
    UNITS,
    Choice,
    Dots,
    Form,
    Many,
    Matrix,
    Relation,
    Union,
    Value,
    Words,
    read,
)
from hpd_verl.tools.rewards.maths_values import expression, proportional, rational, same_expressions


def equal(truth: str, answer: str, in_box: bool = True, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether an answer is equal to the ground truth.

    Args:
        truth: the ground truth, LaTeX or plain.
        answer: what a box holds, or the end of an answer without a box.
        in_box: which of both.
        tolerance: the largest difference of two numbers that counts as none.
    """
    numeric = _is_numeric(truth)
    wanted = read(truth, numeric)
    stated = answer if in_box else statement(answer, isinstance(wanted, Choice | Words))
    return _Comparison(truth, stated, numeric, tolerance).same(wanted, read(stated, numeric))


def _is_numeric(truth: str) -> bool:
    """Whether a ground truth has no variables, apart from words next to its numbers."""
    if re.search(r"\d\s+[mgshLl]\s*\.?\s*$", truth):
        return True
    values = list(_values(read(truth, False)))
    return bool(values) and all(isinstance(each, Value) and not _variables(each.tex) for each in values)


def _values(form: Form) -> Any:
    """All values of a form but those left of an equals sign."""
    match form:
        case Many(items) | Union(items):
            for item in items:
                yield from _values(item)
        case Relation(operators, sides):
            for side in sides if operators[0] != "=" else sides[1:]:
                yield from _values(side)
        case Matrix(rows):
            for row in rows:
                for cell in row:
                    yield from _values(cell)
        case Dots():
            pass
        case _:
            yield form


def _variables(tex: str) -> bool:
    return bool(re.search(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", tex)))


# The statement of an answer without a box

_MARKER = re.compile(
    r"(?:answer|result|答案|答え|正解|정답|ответ|réponse|respuesta|antwort|resposta|risposta)\**\s*"
    r"(?:(?:is|was|are|equals|to be|would be|es|est|ist|é|è)\b|[是为為は은는:：=]|(?=\d|\$|\\|\())"
    r"|答\s*[:：]|答案】?",
    re.I,
)
_END = re.compile(r"\n|(?<=[^\d\s])[.!?。](?=\s|$|\*)|(?<=\d)[.!?。](?=\s|$|\*)|。|,?\s+(?:which|i\.e\.)\s")
_NUMBER = (
    r"(?:[-−+]\s?)?(?:\\?[$€£¥]\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?"
    r"(?:\s?\\?%|\s(?:hundred|thousand|million|billion)\b)?"
)
_PIECE = re.compile(
    rf"⟪[^⟫]*⟫|-?\\[dt]?frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|(?<![\w.\\]){_NUMBER}(?:\s?[-+*/^×÷]\s?\(?{_NUMBER}\)?)*"
)
_JOINT = re.compile(
    r"(?:(?:\s+[a-zA-Z]+){1,2},?\s+or\b|\s*(?:,|;|,?\s*\b(?:and|or)\b|[和或及]))\s*(?:\$?[a-zA-Z]\s*=\s*)?"
)
_NOT = re.compile(
    r"(?:\b(?:not|never|except)|n't|≠|\\neq?|\\not\s*=|不是|不等于|不)\s*(?:equal(?:\s+to)?|be)?\s*$", re.I
)
_DENIED = re.compile(
    r"[\s$*]*(?:(?:is|was|are|does|can)(?:\s+not\b|n't|not\b)|(?:is|was)\s+(?:wrong|incorrect)\b|不(?:是|对))", re.I
)
_MATHS = re.compile(r"(?<!\\)\$\$(.+?)\$\$|(?<![\\\d])\$([^$\n]+)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def statement(text: str, of_letters: bool) -> str:
    """The statement at an answer's end: the text after its last "answer is", else its last formula or number.

    Args:
        text: the answer's end.
        of_letters: whether it is compared with letters or words.
    """
    text = text.strip()
    marker = None
    for marker in _MARKER.finditer(text):  # noqa: B007 (the last one)
        pass
    if marker is not None:
        rest = text[marker.end() :].lstrip(" *:：\n")
        said = rest[: end.start()] if (end := _END.search(rest)) else rest
        if said.strip(" *_$."):
            return said if of_letters or re.search(r"[\d\\=]|[a-zA-Z]\b", said) else rest
    lines = [line for line in text.splitlines() if line.strip(" *.")]
    if of_letters:
        return _letter_in(lines[-1]) if lines else ""
    marked = _MATHS.sub(_as_formula, text)
    pieces = list(_PIECE.finditer(marked))
    if not pieces:
        return lines[-1] if lines else ""
    start = pieces[-1].start()
    for before, piece in zip(reversed(pieces[:-1]), reversed(pieces[1:]), strict=True):
        if piece.start() != start or not _JOINT.fullmatch(marked, before.end(), piece.start()):
            break
        start = before.start()
    said = marked[start : pieces[-1].end()].replace("⟪", " ").replace("⟫", " ")
    denied = _NOT.search(marked, max(0, start - 40), start) or _DENIED.match(marked, pieces[-1].end())
    return f"\\ne {said}" if denied else said


def _letter_in(line: str) -> str:
    """The one choice that a line names, such as "so I choose (C)"; else the line."""
    chosen = set(re.findall(r"\(\s*([A-Z])\s*\)|\b(?:option|choice)\s+([A-Z])\b", line))
    negated = re.search(r"\b(?:not|isn't|neither|except)\b", line, re.I)
    return "".join(*chosen) if len(chosen) == 1 and not negated else line


def _as_formula(match: re.Match[str]) -> str:
    content = next(filter(None, match.groups()), "")
    words = re.search(r"(?<![\\a-zA-Z{])[a-z]{3,}(?![a-zA-Z]*[}({])", content) and "\\" not in content
    return match[0] if words else f"⟪{content}⟫"


# Comparing


@dataclass(frozen=True)
class _Comparison:
    """Of two answers, whose texts are ``truth`` and ``answer``."""

    truth: str
    answer: str
    numeric: bool
    tolerance: Fraction

    def same(self, wanted: Form, given: Form) -> bool:
        """Whether two forms are equal."""
        if wanted == given and not isinstance(wanted, Many):
            return True
        wanted, given = _expanded(wanted), _expanded(given)
        match wanted, given:
            case (Dots(), _) | (_, Dots()):
                return False
            case (Choice(), _) | (_, Choice()) | (Words(), _) | (_, Words()):
                return self._same_letters(wanted, given)
            case (Matrix(), Matrix()):
                return (
                    wanted.determinant == given.determinant
                    and [len(row) for row in wanted.rows] == [len(row) for row in given.rows]
                    and all(
                        self.same(one, other)
                        for row, others in zip(wanted.rows, given.rows, strict=True)
                        for one, other in zip(row, others, strict=True)
                    )
                )
            case (Matrix(), Many()) | (Many(), Matrix()):
                rows = [_rows(each) if isinstance(each, Many) else each for each in (wanted, given)]
                return all(isinstance(each, Matrix) for each in rows) and self.same(rows[0], rows[1])
            case (Matrix(), Value()) | (Value(), Matrix()):
                return self._same_matrices()
            case (Union(), Relation(("!=",))) | (Relation(("!=",)), Union()):
                return self.same(_without_points(wanted), _without_points(given))
            case (Value(), Relation(("!=",))) | (Relation(("!=",)), Value()) | (Union(), Value()) | (Value(), Union()):
                wanted, given = _without_points(wanted), _without_points(given)
                return isinstance(wanted, Union) and isinstance(given, Union) and self.same(wanted, given)
            case (Relation(), _) | (_, Relation()):
                return self._same_relations(wanted, given)
            case (Value(), Value()):
                return self._same_values(wanted, given)
            case (Union(ones), Union(others)) | (Union(ones), Many(others, "")) | (Many(ones, ""), Union(others)):
                return self._matched(ones, others)
            case (Many(), Many()):
                return self._same_many(wanted, given)
            case (Many(), Value()) | (Value(), Many()):
                return self._same_one_and_many(wanted, given)
        return False

    # Letters and words

    def _same_letters(self, wanted: Form, given: Form) -> bool:
        if isinstance(wanted, Choice):
            if isinstance(given, Choice):
                return wanted.letter == given.letter
            if isinstance(given, Words | Value) and _bare_text(given).casefold() == wanted.letter.casefold():
                return True
            return wanted.content is not None and self.same(wanted.content, given)
        if isinstance(given, Choice):
            if isinstance(wanted, Words | Value) and _bare_text(wanted).casefold() == given.letter.casefold():
                return True
            return given.content is not None and self.same(wanted, given.content)
        if isinstance(wanted, Words | Value) and isinstance(given, Words | Value):
            one, other = _words_of(_bare_text(wanted)), _words_of(_bare_text(given))
            return bool(one) and one == other
        return False

    # Values

    def _same_values(self, wanted: Value, given: Value) -> bool:
        if wanted.bound != given.bound:
            return False
        factor = _factor(wanted.words, given.words)
        if factor is None:
            return False
        if wanted.percent and not given.percent:  # 50% is 50, and 0.5
            return self.numbers(wanted.tex, given.tex, factor) or self.numbers(wanted.tex, given.tex, 100 * factor)
        if given.percent and not wanted.percent:
            return self.numbers(wanted.tex, given.tex, factor) or self.numbers(wanted.tex, given.tex, factor / 100)
        return self.numbers(wanted.tex, given.tex, factor)

    def numbers(self, wanted: str, given: str, factor: Fraction = Fraction(1)) -> bool:
        """Whether ``wanted`` is ``factor`` times ``given``."""
        if any(re.fullmatch(r"\d{4}-\d\d-\d\d", each) for each in (wanted, given)):  # a date, no difference
            return wanted == given
        one, other = rational(wanted), rational(given)
        if one is not None and other is not None:
            return abs(one - factor * other) <= self.tolerance
        if factor == 1 and wanted == given:
            return bool(wanted)
        letters = [re.sub(r"[\s{}]", "", each) for each in (wanted, given)]
        runs = [sorted(re.findall(r"[A-Z]{2,}", each)) for each in letters]
        if any(re.fullmatch(r"[A-Z]{2,}", each) for each in letters) or (all(runs) and runs[0] != runs[1]):
            return letters[0] == letters[1]
        if all(re.fullmatch(r"[a-z]{3,}", each.strip()) for each in (wanted, given)):
            return False  # words; a product has signs, spaces or no more than two letters
        if any("\\ldots" in each for each in letters) or letters[0].count("'") != letters[1].count("'"):
            return False
        lower = not _both_cases(wanted + given)
        left = one if one is not None else expression(wanted, lower)
        right = other if other is not None else expression(given, lower)
        if left is None or right is None:
            return False
        return same_expressions(left, right, factor, self.tolerance)

    # Several

    def _same_many(self, wanted: Many, given: Many) -> bool:
        if any(isinstance(item, Dots) for item in (*wanted.items, *given.items)):
            brackets = {(each.opening, each.closing) for each in (wanted, given)}
            return (len(brackets) == 1 or ("", "") in brackets) and self._in_order(wanted.items, given.items)
        if wanted.opening == given.opening == "":
            return self._matched(wanted.items, given.items)
        if wanted.opening == given.opening == "⦃":
            return _covers(self, wanted.items, given.items) and _covers(self, given.items, wanted.items)
        kinds = {wanted.opening, given.opening}
        if "⦃" in kinds:
            return "" in kinds and self._matched(wanted.items, given.items)
        if "" in kinds:  # a tuple without its brackets; two numbers in square brackets are an interval
            bracketed = wanted if wanted.opening else given
            round_ = (bracketed.opening, bracketed.closing) in (("(", ")"), ("⟨", "⟩"))
            return (round_ or len(bracketed.items) > 2) and self._in_order(wanted.items, given.items)
        brackets_agree = (wanted.opening, wanted.closing) == (given.opening, given.closing)
        return (brackets_agree or len(wanted.items) > 2 or kinds == {"(", "⟨"}) and self._in_order(
            wanted.items, given.items
        )

    def _in_order(self, wanted: tuple[Form, ...], given: tuple[Form, ...]) -> bool:
        return len(wanted) == len(given) and all(
            self.same(one, _right_side(other) if not isinstance(one, Relation) else other)
            for one, other in zip(wanted, given, strict=True)
        )

    def _matched(self, wanted: tuple[Form, ...], given: tuple[Form, ...]) -> bool:
        """Whether each of one has its own in the other."""
        if len(wanted) != len(given):
            return False
        left = list(given)
        for one in wanted:
            found = next((number for number, other in enumerate(left) if self.same(one, other)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _same_one_and_many(self, wanted: Form, given: Form) -> bool:
        """One value and several: a set of one, or commas that part thousands in one and items in the other."""
        if isinstance(wanted, Many) and isinstance(given, Value):
            if len(wanted.items) == 1:
                return self.same(wanted.items[0], given)
            if given.bound in (">", "<", ">=", "<="):
                return self._same_relations(wanted, given)
            again = read(self.answer, self.numeric, thousands=False)
            return isinstance(again, Many) and not wanted.opening and self._same_many(wanted, again)
        if isinstance(given, Many) and isinstance(wanted, Value):
            if len(given.items) == 1:
                return self.same(wanted, given.items[0])
            if wanted.bound in (">", "<", ">=", "<="):
                return self._same_relations(wanted, given)
            if re.fullmatch(r"\s*-?0,\d+\s*", self.answer):  # a decimal comma
                return self.same(wanted, read(self.answer.replace(",", "."), self.numeric))
            if not given.opening and re.search(r"\bor\b|或", self.answer):  # one value, said again
                return all(self.same(wanted, item) and self.same(given.items[0], item) for item in given.items)
            again = read(self.truth, self.numeric, thousands=False)
            return isinstance(again, Many) and not given.opening and self._same_many(again, given)
        return False

    # Relations

    def _same_relations(self, wanted: Form, given: Form) -> bool:
        if isinstance(wanted, Relation) and set(wanted.operators) <= {"=", "~"}:
            if isinstance(given, Relation):
                return set(given.operators) <= {"=", "~"} and self._same_equations(wanted, given)
            return _is_name(wanted.sides[0]) and any(self.same(side, given) for side in self._stated(wanted))
        if isinstance(given, Relation) and set(given.operators) <= {"=", "~"}:
            return any(self.same(wanted, side) for side in self._stated(given))
        one, other = _interval(wanted), _interval(given)
        if one is not None and other is not None:
            return (not one[0] or not other[0] or one[0] == other[0]) and self._same_many(one[1], other[1])
        if not (isinstance(wanted, Relation) and isinstance(given, Relation)):
            inequalities = any(isinstance(each, Relation) and "!=" not in each.operators for each in (wanted, given))
            return inequalities and not isinstance(given, Value) and self._by_math_verify()
        if wanted.operators == given.operators and self._in_order(wanted.sides, given.sides):
            return True
        if len(wanted.operators) == len(given.operators) == 1:
            turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
            if wanted.operators == given.operators and self._same_difference(wanted, given, positive=True):
                return True
            sign = turned.get(given.operators[0])
            swapped = Relation((sign,), given.sides[::-1]) if sign else None
            if swapped and wanted.operators == swapped.operators:
                return self._same_difference(wanted, swapped, positive=True)
        return not {"!=", "not in"} & {*wanted.operators, *given.operators} and self._by_math_verify()

    def _stated(self, relation: Relation) -> list[Form]:
        """What a chain says: its last side; both sides of a sign of nearness, if they are near, else none."""
        last = relation.sides[-1]
        if _is_name(last) and not _is_name(relation.sides[0]):  # 5 = x
            return [relation.sides[0]]
        if relation.operators[-1] != "~" or len(relation.sides) < 2:
            return [last]
        exact = relation.sides[-2]
        if _is_name(exact):
            return [last]
        rounded = _decimal(last)
        if rounded is None:
            return [last]
        return [exact, last] if replace(self, tolerance=abs(rounded) / 50).same(exact, last) else []

    def _same_equations(self, wanted: Relation, given: Relation) -> bool:
        left = [each.sides[0] for each in (wanted, given)]
        if all(map(_is_name, left)):
            names = [re.sub(r"[\s{}]", "", _bare_text(each)) for each in left]
            if names[0] == names[1] or (not _both_cases("".join(names)) and names[0].lower() == names[1].lower()):
                return self.same(wanted.sides[-1], given.sides[-1])
        elif self._in_order(wanted.sides, given.sides):
            return True
        return len(wanted.sides) == len(given.sides) == 2 and self._same_difference(wanted, given, positive=False)

    def _same_difference(self, wanted: Relation, given: Relation, positive: bool) -> bool:
        """Whether left minus right are the same but for a factor."""
        sides = [*wanted.sides, *given.sides]
        if not all(isinstance(side, Value) and not side.bound for side in sides):
            return False
        texts = [side.tex for side in sides if isinstance(side, Value)]
        lower = not _both_cases("".join(texts))
        parsed = [expression(text, lower) for text in texts]
        if any(each is None for each in parsed):
            return False
        return proportional(parsed[0] - parsed[1], parsed[2] - parsed[3], positive)

    # The parser's own comparisons

    def _by_math_verify(self) -> bool:
        from math_verify import parse, verify

        wanted, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (self.truth, self.answer))
        return bool(wanted and given) and verify(
            wanted, given, timeout_seconds=None, float_rounding=50, numeric_precision=200, allow_set_relation_comp=True
        )

    def _same_matrices(self) -> bool:
        """A matrix and a multiple of one."""
        wanted, given = (expression(text, False) for text in (self.truth, self.answer))
        if wanted is None or given is None:
            return False
        difference = (wanted - given).doit() if getattr(wanted, "shape", 0) == getattr(given, "shape", 1) else None
        return bool(difference is not None and difference.is_zero_matrix)


def _covers(comparison: _Comparison, ones: tuple[Form, ...], others: tuple[Form, ...]) -> bool:
    return all(any(comparison.same(one, other) for other in others) for one in ones)


def _rows(form: Many) -> Form:
    """A list of lists of one length as a matrix."""
    rows = [each.items for each in form.items if isinstance(each, Many) and each.opening == "["]
    alike = form.opening == "[" and len(rows) == len(form.items) and len({*map(len, rows)}) == 1
    return Matrix(tuple(rows), False) if alike else form


def _without_points(form: Form) -> Form:
    r"""``x \ne 2`` or ``\mathbb{R} \setminus \{2\}`` as a union of intervals."""
    points: tuple[Form, ...] = ()
    if isinstance(form, Relation) and form.operators == ("!=",) and _is_name(form.sides[0]):
        points = form.sides[1:]
    elif isinstance(form, Value) and (
        found := re.fullmatch(r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-)\s*⦃(.*)⦄", form.tex)
    ):
        inside = read(found[1], True, thousands=False)
        points = inside.items if isinstance(inside, Many) else (inside,)
    known = [(value, point) for point in points if (value := _decimal(point)) is not None]
    if not known or len(known) < len(points):
        return form
    ends = (Value("-\\infty"), *(point for _, point in sorted(known, key=lambda each: each[0])), Value("\\infty"))
    return Union(tuple(Many(pair, "(", ")") for pair in itertools.pairwise(ends)))


_REALS = Value("\\mathbb{R}")


def _expanded(form: Form) -> Form:
    r"""``3 \pm x`` as both of its values."""
    if isinstance(form, Value) and re.search(r"\\[pm][mp](?![a-zA-Z])", form.tex):
        upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", form.tex))
        lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", form.tex))
        return Many((replace(form, tex=upper), replace(form, tex=lower)))
    if isinstance(form, Words) and " ".join(_words_of(form.text)) in ("all real number", "all real", "real number"):
        return _REALS
    if form == Many((Value("-\\infty"), Value("\\infty")), "(", ")"):
        return _REALS
    if isinstance(form, Many) and form.opening in ("", "⦃"):
        items: list[Form] = []
        for item in form.items:
            pair = _expanded(item) if isinstance(item, Value) else item
            items += pair.items if isinstance(pair, Many) and isinstance(item, Value) else [item]
        return replace(form, items=tuple(items))
    return form


def _right_side(form: Form) -> Form:
    return form.sides[-1] if isinstance(form, Relation) and set(form.operators) == {"="} else form


def _bare_text(form: Form) -> str:
    """Of words, of a letter, or of a value."""
    if isinstance(form, Choice):
        return form.letter
    assert isinstance(form, Words | Value)
    return form.text if isinstance(form, Words) else " ".join([form.tex.strip("(){} "), *form.words]).strip()


_FILLING = {"the", "a", "an", "is", "are", "it", "its", "answer", "final", "of", "that", "this", "so"}


def _words_of(text: str) -> list[str]:
    """Words without articles, case, punctuation and plural."""
    words = re.findall(r"[^\W_]+|[<>=+*/^\\-]", text.casefold())
    kept = [word for word in words if word not in _FILLING] or words
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept]


def _factor(wanted: tuple[str, ...], given: tuple[str, ...]) -> Fraction | None:
    """Factor from the given to the wanted unit; None if units or words are of different things."""
    if not wanted or not given:
        return Fraction(1)
    units = [UNITS.get(words[0]) or UNITS.get(words[0].removesuffix("s")) for words in (wanted, given)]
    if len(wanted) == len(given) == 1 and units[0] and units[1]:
        if units[0][0] != units[1][0]:
            return None
        return Fraction(str(units[1][1])) / Fraction(str(units[0][1]))
    one, other = set(_words_of(" ".join(wanted))), set(_words_of(" ".join(given)))
    return Fraction(1) if one <= other or other <= one else None


def _is_name(form: Form) -> bool:
    """Whether a side of an equation only names something: x, f(x), AB, an angle, or words."""
    if isinstance(form, Words | Choice):
        return True
    return isinstance(form, Value) and bool(
        re.fullmatch(
            r"(?:\\(?:angle|triangle|overline|vec|hat|bar|operatorname)\s*)?\{?\s*(?:\\?[a-zA-Z]+)\}?(?:_\{?\w+\}?)?'*\s*"
            r"(?:\([^()=]*\))?",
            form.tex,
        )
    )


def _interval(form: Form) -> tuple[str, Many] | None:
    """The variable and the interval of an inequality; of an interval, of no variable."""
    if isinstance(form, Many) and len(form.items) == 2 and form.opening in ("(", "["):
        return "", form
    if isinstance(form, Value) and form.bound in ("<", "<=", ">", ">="):
        sides: tuple[Form, ...] = (Value("x"), replace(form, bound=""))
        operators: tuple[str, ...] = (form.bound,)
        name = ""
    elif isinstance(form, Relation) and (set(form.operators) <= {"<", "<="} or set(form.operators) <= {">", ">="}):
        sides, operators = form.sides, form.operators
        names = [side.tex for side in sides if isinstance(side, Value) and re.fullmatch(r"\\?[a-zA-Z]+", side.tex)]
        if len(names) != 1:
            return None
        name = names[0]
    else:
        return None
    if operators[0].startswith(">"):
        sides, operators = sides[::-1], tuple(each.replace(">", "<") for each in operators[::-1])
    variable = next(
        number for number, side in enumerate(sides) if isinstance(side, Value) and side.tex == (name or "x")
    )
    low, high = Value("-\\infty"), Value("\\infty")
    match variable, len(sides):
        case 0, 2:
            return name, Many((low, sides[1]), "(", "]" if operators[0] == "<=" else ")")
        case 1, 2:
            return name, Many((sides[0], high), "[" if operators[0] == "<=" else "(", ")")
        case 1, 3:
            ends = "[" if operators[0] == "<=" else "(", "]" if operators[1] == "<=" else ")"
            return name, Many((sides[0], sides[2]), *ends)
    return None


def _both_cases(text: str) -> bool:
    """Whether a letter stands there in upper and in lower case as names of two things."""
    letters = set(re.sub(r"\\[a-zA-Z]+", "", text))
    return any(letter.islower() and letter.upper() in letters for letter in letters)


def _decimal(form: Form) -> Fraction | None:
    return rational(form.tex) if isinstance(form, Value) else None
