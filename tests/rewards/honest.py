"""Programs that a sandbox must let pass, each with its tests."""

# ruff: noqa: E501 (programs in one line)

HONEST = {
    "prints": ("def f(x):\n    print('working', x)\n    return x * 2\nprint(f(1))", "assert f(2) == 4"),
    "recursion": ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)", "assert f(15) == 610"),
    "deep recursion": ("def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)", "assert f(900) == 900"),
    "floats": (
        "import math\ndef f(x):\n    return math.sqrt(x)",
        "assert abs(f(2) - 1.41421356) < 1e-6\nassert f(4) == 2.0",
    ),
    "not a number": ("def f():\n    return [float('inf'), float('nan')]", "a, b = f()\nassert a > 0 and b != b"),
    "big numbers": ("def f(n):\n    return 2 ** n", "assert f(100000) == 2 ** 100000 and f(-1) == 0.5"),
    "texts": ("def f(s):\n    return s[::-1]", "assert f('añ✓\\ud800') == '\\ud800✓ña'\nassert f('') == ''"),
    "bytes": ("def f(s):\n    return s.encode(), bytearray(2)", "assert f('é') == (b'\\xc3\\xa9', bytearray(2))"),
    "containers": (
        "def f(x):\n    return {(1, 2): [x, {3}, frozenset({4})], None: True}",
        "assert f({'a': 1}) == {(1, 2): [{'a': 1}, {3}, frozenset({4})], None: True}",
    ),
    "types are kept": (
        "def f():\n    return True, 1, (1,), [1]",
        "assert [type(x) for x in f()] == [bool, int, tuple, list]",
    ),
    "other numbers": (
        "from fractions import Fraction\nfrom decimal import Decimal\ndef f():\n    return Fraction(1, 3), Decimal('0.1'), 1j",
        "from fractions import Fraction\nfrom decimal import Decimal\nassert f() == (Fraction(1, 3), Decimal('0.1'), 1j)",
    ),
    "counter": (
        "from collections import Counter\ndef f(s):\n    return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f():\n    return P(1, 2)",
        "assert f() == (1, 2)",
    ),
    "range": ("def f(n):\n    return range(n)", "assert f(3) == range(3) and list(f(2)) == [0, 1]"),
    "generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(iter(f(2))) == 0"),
    "class": (
        "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None\n"
        "    def last(self):\n        return self.next.last() if self.next else self.value\n"
        "def length(node):\n    return 0 if node is None else 1 + length(node.next)",
        "a = Node(1)\na.next = Node(2)\nassert length(a) == 2 and a.next.value == 2 and a.last() == 2",
    ),
    "sequence of its own": (
        "class S:\n    def __getitem__(self, i):\n        return i * 2\n    def __len__(self):\n        return 3",
        "s = S()\nassert s[4] == 8 and len(s) == 3",
    ),
    "data class": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def moved(self, by):\n        return P(self.x + by)",
        "assert P(1).moved(by=2).x == 3",
    ),
    "exception": (
        "class Own(Exception):\n    pass\ndef f(x):\n    raise ValueError('odd') if x else Own('own')",
        "try:\n    f(1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'odd'\n"
        "try:\n    f(0)\n    raise SystemExit\nexcept Exception as error:\n    assert 'own' in str(error)",
    ),
    "constant": ("LIMIT = 7\ndef f():\n    return LIMIT", "assert f() == LIMIT"),
    "name of Python's own": ("def sum(a, b):\n    return a + b", "assert sum(1, 2) == 3"),
    "names of arguments": (
        "def f(number, op=1, *, self=0):\n    return number + op + self",
        "assert f(number=1, op=2, self=3) == 6\nassert f(1) == 2",
    ),
    "name of a module": ("def queue(a):\n    return a", "assert queue(3) == 3"),
    "module of the program": ("import math\ndef f(x):\n    return x * math.pi", "assert math.isclose(f(1), math.pi)"),
    "numpy": (
        "import numpy as np\ndef f(n):\n    return np.arange(n).sum(), np.ones(2)",
        "assert f(4) == (6, [1.0, 1.0])",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n    with ThreadPoolExecutor(4) as pool:\n"
        "        return sorted(pool.map(abs, range(-n, 0)))",
        "assert f(3) == [1, 2, 3]",
    ),
    "file": ("def f(s):\n    open('x', 'w').write(s)\n    return open('/tmp/x').read()", "assert f('abc') == 'abc'"),
    "script": ("def f():\n    return 1\nif __name__ == '__main__':\n    f(1, 2)", "assert f() == 1"),
    "check": (
        "def f(x):\n    return x",
        "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 1\ncheck(f)",
    ),
    "arguments are copies": ("def f(x):\n    x.append(1)\n    return x", "a = []\nassert f(a) == [1] and a == []"),
    "works in place": (
        "def f(x, more=None):\n    x.reverse()\n    x[0].append(9)\n    if more:\n        more.clear()",
        "a, d = [1, [2]], {1: 2}\nassert f(a, more=d) is None and a == [[2, 9], 1] and d == {}",
    ),
    "functions as arguments": (
        "def f(g, x):\n    return g(x)\ndef h(x):\n    return x + 1\ndef s(x, key, kind):\n    return kind(sorted(x, key=key))",
        "import operator\nassert f(lambda x: x + 1, 2) == 3 and f(len, [1]) == 1 and f(operator.neg, 1) == -1\n"
        "assert f(lambda x: h(x) * 2, 1) == 4 and f(h, 2) == 3\n"
        "assert s(list(range(3000)), lambda x: -x, tuple) == tuple(range(2999, -1, -1))\n"
        "try:\n    f(lambda x: 1 / x, 0)\n    assert False\nexcept ZeroDivisionError:\n    pass",
    ),
    "iterators as arguments": (
        "def f(x):\n    return sum(x)",
        "assert f(x for x in (1, 2)) == 3 == f(map(int, '12')) and f({1: 2}.values()) == 2",
    ),
    "iterator": (
        "def f():\n    yield 1\n    yield 2",
        "i = f()\nassert next(i) == 1 and list(i) == [2] and next(i, 7) == 7 and hasattr(i, '__next__')",
    ),
    "names of arguments, self among them": (
        "def f(op, number, self=1):\n    return op + number",
        "assert f(op=1, number=2, self=3) == 3",
    ),
    "derived exceptions": (
        "import json\nclass Own(KeyError):\n    pass\ndef f(x):\n    return json.loads('{') if x else 'é'.encode('ascii')\n"
        "def g():\n    raise Own('k')",
        "for x in (0, 1):\n    try:\n        f(x)\n        assert False\n    except ValueError:\n        pass\n"
        "try:\n    g()\n    assert False\nexcept KeyError as error:\n    assert str(error) == \"'k'\"",
    ),
    "dates": (
        "import datetime\ndef f(x):\n    return x + datetime.timedelta(1), x.year",
        "from datetime import date, datetime\nassert f(date(2020, 2, 28)) == (date(2020, 2, 29), 2020)\n"
        "assert f(datetime(2020, 1, 1, 5))[0] == datetime(2020, 1, 2, 5)",
    ),
    "deque": (
        "from collections import deque\ndef f():\n    return deque([1])",
        "from collections import deque\nassert f() == deque([1]) and f() != [1]",
    ),
    "module's name as a function's": (
        "def copy(x):\n    return x\ndef f():\n    return 1",
        "assert copy(3) == 3 and f() == 1",
    ),
    "docstring tests": (
        "def f(x):\n    '''>>> f(1)\n    1'''\n    return x\nimport doctest\ndoctest.testmod()",
        "assert f(1) == 1",
    ),
    "a shorter time": (
        "import signal, time\ndef f():\n    time.sleep(0.1)\n    return signal.SIGTERM",
        "assert f() == 15",
    ),
    "tests of EvalPlus that compare numbers by numpy": (
        "def f(xs):\n    return [x * 0.1 for x in xs]",
        "import numpy as np\ndef is_floats(x):\n    if isinstance(x, (list, tuple)):\n"
        "        return all(isinstance(i, float) for i in x)\n    return isinstance(x, float)\n"
        "def assertion(out, exp, atol):\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
        "    if out != exp and atol != 0:\n        np.testing.assert_allclose(out, exp, atol=atol)\n"
        "    else:\n        assert out == exp\n"
        "def check(candidate):\n    for inp, exp in zip([[[1, 2, 3]], [[]]], [[0.1, 0.2, 0.3], []]):\n"
        "        assertion(candidate(*inp), exp, 0)\ncheck(f)",
    ),
    "tests of EvalPlus": (
        "def f(x, y):\n    return [x / y, y]",
        "import numpy as np\ndef assertion(out, exp, atol):\n    exact = out == exp\n"
        "    if not exact and all(isinstance(x, (int, float)) for x in exp):\n"
        "        assert type(out) == type(exp) and np.allclose(out, exp, rtol=1e-07, atol=atol)\n        return\n    assert exact\n"
        "for inp, exp in zip([[1, 3], [2, 4]], [[0.33333333333, 3], [0.5, 4]]):\n    assertion(f(*inp), exp, 1e-6)",
    ),
}
