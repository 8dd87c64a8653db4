"""Values of answers: numbers in digits exactly, expressions at points of their variables."""

import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

LARGEST_EXPONENT = 10_000
"""Of ten, in a number that is read as a fraction; beyond it the parser's power is taken."""
POINTS = 14
"""At which expressions with variables are compared."""
DIGITS = (50, 2000)
"""To which values are compared: what agrees in the first agrees in the second too, or differs by a small term."""

_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(_DIGITS)
_SLASH = re.compile(rf"(-?{_DIGITS})\s*/\s*(-?{_DIGITS})")
_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[\d.]+)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d.]+)\s*\}|(\d))")
_MIXED = re.compile(
    r"(\d+)\s*(?:\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|(?<=\s)(\d+)\s*/\s*(\d+))"
)
_POWER = re.compile(
    rf"(?:({_DIGITS})\s*(?:\\times|\\cdot|\*|x|X)\s*)?10\s*(?:\^|\*\*)\s*(?:\{{\s*([-+]?\d+)\s*\}}|\(\s*([-+]?\d+)\s*\)|(-?\d+))"
)
_EXPONENT = re.compile(rf"({_DIGITS})[eE]([-+]?\d{{1,5}})")
_SCALED = re.compile(rf"({_DIGITS})\s*\\cdot\s*(\d+)")
_BASE = re.compile(r"([0-9a-zA-Z]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))")
_DOTTED = re.compile(r"(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_ENDLESS = re.compile(r"(\d*)\.(\d*?)(?:(\d)\3{2,}|(\d{2,}?)\4+)\s*\\ldots")


def rational(tex: str) -> Fraction | None:
    """The exact value of a number in digits: integer, decimal, fraction, mixed, repeating, power of ten, other base."""
    text, sign = tex.strip(), 1
    while True:
        if text[:1] in ("-", "+"):
            sign, text = sign * (-1 if text[0] == "-" else 1), text[1:].lstrip()
        elif len(text) > 2 and text[0] in "{(" and text[-1] in ")}" and re.fullmatch(r"[^(){}]*", text[1:-1]):
            text = text[1:-1].strip()
        else:
            break
    try:
        value = _unsigned(text)
    except (ZeroDivisionError, ValueError):
        return None
    return None if value is None else sign * value


def _unsigned(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return Fraction(text if text[-1] != "." else text[:-1])
    if found := _SLASH.fullmatch(text):
        return Fraction(found[1]) / Fraction(found[2])
    if found := _FRAC.fullmatch(text):
        return Fraction(found[1] or found[2]) / Fraction(found[3] or found[4])
    if found := _MIXED.fullmatch(text):
        over, under = found[2] or found[3] or found[6], found[4] or found[5] or found[7]
        return int(found[1]) + Fraction(int(over), int(under))
    if found := _EXPONENT.fullmatch(text):
        return _times_ten(found[1], found[2])
    if found := _POWER.fullmatch(text):
        if found[4] and len(found[4].lstrip("-")) > 1 and not found[4].startswith("-"):
            return _times_ten(found[1] or "1", found[4])  # 10^12 as people write it
        return _times_ten(found[1] or "1", found[2] or found[3] or found[4])
    if found := _SCALED.fullmatch(text):
        return Fraction(found[1]) * int(found[2])
    if found := _BASE.fullmatch(text):
        base = int(found[2] or found[3])
        return Fraction(int(found[1], base)) if 2 <= base <= 36 and found[1][0].isdigit() else None
    if found := _DOTTED.fullmatch(text):
        return _repeating(found[1], found[2], found[3] + found[4] + found[5])
    if found := _REPEATING.fullmatch(text):
        return _repeating(found[1], found[2], found[3] or found[4] or found[5])
    if found := _ENDLESS.fullmatch(text):
        return _repeating(found[1], found[2], found[3] or found[4])
    return None


def _times_ten(number: str, exponent: str) -> Fraction | None:
    power = int(exponent)
    return Fraction(number) * Fraction(10) ** power if abs(power) <= LARGEST_EXPONENT else None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    scale = 10 ** len(fixed)
    return int(whole or 0) + Fraction(int(fixed or 0), scale) + Fraction(int(period), (10 ** len(period) - 1) * scale)


# Expressions


@lru_cache(maxsize=256)
def expression(tex: str, lower: bool) -> Any:
    """A sympy expression, with decimals as fractions; None where the parser finds none.

    Args:
        tex: as ``maths_forms`` leaves it.
        lower: take letters of both cases for the same.
    """
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig
    from math_verify.grader import should_treat_as_complex

    text = tex.replace("⦃", r"\{").replace("⦄", r"\}").replace("⏎", r"\\").replace("⟨", "(").replace("⟩", ")")
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", r"(\1\\cdot\\pi/180)", text)
    text = re.sub(r"(?<!\\)(?<![a-zA-Z])(sqrt|sin|cos|tan|log|ln|exp|pi)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace("**", "^")
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    # The parser drops a number's base, and reads 1 2 as 12.
    if re.search(r"\d\s*_|(?<![\d_^])\d+\s+\d|[?@#⟪]", text):
        return None
    try:
        found = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none"),
            conversion_config=ConversionConfig(lowercase_symbols=lower),
        )
        return _exact(found)
    # The parser raises errors of every kind on odd LaTeX; such text is not an expression.
    except Exception:
        return None


def _exact(found: Any) -> Any:
    """Evaluated, its decimals as fractions."""
    import sympy

    if isinstance(found, sympy.Basic) and not isinstance(found, sympy.MatrixBase | sympy.MatrixExpr):
        found = found.xreplace({each: sympy.I for each in found.free_symbols if each.name == "i"})
        floats = {each: sympy.Rational(str(each)) for each in found.atoms(sympy.Float)}
        return (found.xreplace(floats) if floats else found).doit()
    return found.doit() if hasattr(found, "doit") else found


def same_expressions(left: Any, right: Any, factor: Fraction, tolerance: Fraction) -> bool:
    import sympy

    left, right = (
        sympy.Rational(each.numerator, each.denominator) if isinstance(each, Fraction) else each
        for each in (left, right)
    )
    if not all(isinstance(each, sympy.Expr) for each in (left, right)):
        return bool(factor == 1 and left == right)
    if factor != 1:
        right = right * sympy.Rational(factor.numerator, factor.denominator)
    if left == right:
        return left not in (sympy.nan, sympy.zoo)
    if not left.free_symbols and not right.free_symbols:
        return _same_constants(left, right, tolerance)
    found = _at_points(left, right)
    if found is not None:
        return found
    return bool(sympy.simplify(left - right) == 0)


def _same_constants(left: Any, right: Any, tolerance: Fraction) -> bool:
    """Two numbers without variables, which are compared exactly where both are fractions."""
    import sympy

    if left.is_Rational and right.is_Rational and not tolerance:
        return False  # their forms differ
    kinds = {left.is_rational, right.is_rational}
    if kinds == {True, False} and not tolerance:
        return False
    for digits in DIGITS:
        one, other = left.evalf(digits), right.evalf(digits)
        if not (one.is_number and other.is_number) or not (one.is_finite and other.is_finite):
            return bool(sympy.simplify(left - right) == 0)
        if tolerance:
            return bool(abs(one - other) <= sympy.Rational(tolerance.numerator, tolerance.denominator))
        if not _agree(one, other, digits):
            return False
    return True


def _agree(one: Any, other: Any, digits: int) -> bool:
    """Whether two values are one, but for what was lost while they were computed."""
    import sympy

    lost = sympy.Float(10, 20) ** -(digits * 9 // 10)
    return bool(abs(one - other) <= max(max(abs(one), abs(other)) * lost, sympy.Float(10, 20) ** (5 - digits)))


def _points(symbols: list[Any]) -> Any:
    """Values of variables: above zero, below, and whole."""
    import sympy

    draw = random.Random(0)
    for number in range(POINTS):
        if number < 6:
            values = [sympy.Rational(draw.randint(100, 3000), 1009) for _ in symbols]
        elif number < 10:
            values = [sympy.Rational(draw.choice((-1, 1)) * draw.randint(100, 3000), 1013) for _ in symbols]
        else:
            values = [sympy.Integer(draw.randint(1, 9)) for _ in symbols]
        yield dict(zip(symbols, values, strict=True))


def _values_at(left: Any, right: Any, digits: int) -> Any:
    """Pairs of both values where both are real, or complex if either has an imaginary unit."""
    import sympy

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    imaginary = left.has(sympy.I) or right.has(sympy.I)
    roots = [each for each in left.atoms(sympy.Pow) | right.atoms(sympy.Pow) if not each.exp.is_integer]
    logarithms = left.atoms(sympy.log) | right.atoms(sympy.log)
    for point in _points(symbols):
        parts = [each.base for each in roots if not each.exp.subs(point).is_integer]
        parts += [each.args[0] for each in logarithms]
        if not imaginary and any(
            (value := part.subs(point).evalf(20)).is_real is not True or value < 0 for part in parts
        ):
            continue
        one, other = left.subs(point).evalf(digits), right.subs(point).evalf(digits)
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            continue
        if imaginary or (one.is_real and other.is_real):
            yield one, other


def _at_points(left: Any, right: Any) -> bool | None:
    """Whether two expressions agree wherever both are real; None if there are too few such points."""
    count = 0
    for one, other in _values_at(left, right, DIGITS[0]):
        if not _agree(one, other, DIGITS[0]):
            return False
        count += 1
    if count < 3:
        return None
    one, other = next(_values_at(left, right, DIGITS[1]))
    return _agree(one, other, DIGITS[1])


def proportional(left: Any, right: Any, positive: bool) -> bool:
    """Whether one expression is a constant times the other; ``positive`` asks for its sign."""
    for digits, enough in zip(DIGITS, (POINTS, 3), strict=True):
        ratio: Any = None
        count = 0
        for one, other in _values_at(left, right, digits):
            zeros = [_agree(each, 0, digits) for each in (one, other)]
            if any(zeros):
                if not all(zeros):
                    return False
                continue
            found = one / other
            if ratio is not None and not _agree(found, ratio, digits):
                return False
            ratio, count = found, count + 1
            if count == enough:
                break
        if count < 3 or (positive and not ratio > 0):
            return False
    return True
