"""Programs that a sandbox must let pass, each with its tests."""

# ruff: noqa: E501 (programs in one line)

_CASE = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(2), 4)\n"

HONEST = {
    "prints": ("def f(x):\n    print('working', x)\n    return x * 2\nprint(f(1))", "assert f(2) == 4"),
    "unittest.main": ("def f(x):\n    return x * 2", _CASE + "if __name__ == '__main__':\n    unittest.main()"),
    "unittest.main that goes on": ("def f(x):\n    return x * 2", _CASE + "unittest.main(argv=[''], exit=False)"),
    "main program of the tests": (
        "def f(x):\n    return x * 2",
        "def check(f):\n    assert f(2) == 4\nif __name__ == '__main__':\n    check(f)",
    ),
    "a class by its name in a text": (
        "class Box:\n    def put(self, x):\n        self.x = x\n    def get(self):\n        return self.x",
        "box = globals()['Box']()\nout = [getattr(box, name)(*args) for name, args in (('put', [1]), ('get', []))]\n"
        "assert out == [None, 1]",
    ),
    "eval in tests": ("def f(x):\n    return x * 2", "assert eval('f(2)') == 4"),
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
    # Objects in the hands of tests: each passes in one module with its tests too.
    "arrays: shape, dtype, type": (
        "import numpy as np\ndef f(n): return np.zeros((n,2))",
        "r=f(3)\nassert r.shape==(3,2) and r.dtype==float and r.sum()==0 and r.T.shape==(2,3)\nassert (r==0).all()\nassert r[0].tolist()==[0,0]\nimport numpy as np\nassert isinstance(r,np.ndarray) and type(r) is np.ndarray and np.allclose(r,np.zeros((3,2)))",
    ),
    "arrays as arguments": (
        "def f(x): return x.mean(), x*2, x.reshape(-1)",
        "import numpy as np\nm,d,r=f(np.array([[1.,2.],[3.,4.]]))\nassert m==2.5 and np.array_equal(d,[[2,4],[6,8]]) and r.shape==(4,)\nnp.testing.assert_allclose(d,np.array([[2,4],[6,8]]))\nassert np.isclose(m,2.5)",
    ),
    "an array changed in place": (
        "def f(x): x *= 2",
        "import numpy as np\nx=np.ones(3)\nf(x)\nassert x.tolist()==[2,2,2]",
    ),
    "numpy's numbers": (
        "import numpy as np\ndef f(): return np.float64(2.5)\ndef g(): return np.int32(7)",
        "assert f()==2.5 and abs(f()-2.5)<1e-9 and f().shape==() and g().item()==7 and isinstance(f(),float)\nimport numpy as np\nassert isinstance(g(),np.integer)",
    ),
    "matrices": (
        "import numpy as np\ndef inv(a): return np.linalg.inv(a)",
        "import numpy as np\nA=np.array([[2.,1],[1,3]])\nassert np.allclose(inv(A)@A,np.eye(2)) and np.allclose(inv(A)@A-np.eye(2),0)",
    ),
    "arrays of truth": (
        "import numpy as np\ndef f(x): return np.asarray(x)>1",
        "import numpy as np\nassert (f([1,2,3])==np.array([False,True,True])).all() and f([2]).all() and np.all(f([1,2])==[False,True])",
    ),
    "arrays of objects": (
        "import numpy as np\ndef f(): return np.array(['a',None,3],dtype=object)",
        "assert f().tolist()==['a',None,3]",
    ),
    "arrays of texts": (
        "import numpy as np\ndef f(): return np.array(['a','bc'])",
        "assert list(f())==['a','bc'] and f().shape==(2,)",
    ),
    "empty arrays": (
        "import numpy as np\ndef f(): return np.array([])",
        "import numpy as np\nassert f().size==0 and len(f())==0 and np.array_equal(f(),[]) and np.allclose(f(),np.array([]))",
    ),
    "contains": (
        "class Interval:\n def __init__(s,a,b): s.a,s.b=a,b\n def __contains__(s,x): return s.a<=x<=s.b",
        "i=Interval(1,5)\nassert 3 in i and 7 not in i and not (9 in i)",
    ),
    "contains inf": (
        "class I:\n def __init__(s,a,b): s.a,s.b=a,b\n def __contains__(s,x): return s.a<=x<=s.b",
        "assert 3 in I(0,float('inf')) and -1 not in I(0,float('inf'))",
    ),
    "contains from function": (
        "class Bag:\n def __init__(s,xs): s.xs=list(xs)\n def __contains__(s,x): return x in s.xs\ndef bag(xs): return Bag(xs)",
        "assert 3 in bag([1,3]) and 2 not in bag([1]) and 'a' in bag('abc')",
    ),
    "trie": (
        "class Trie:\n def __init__(s): s.w=set()\n def insert(s,w): s.w.add(w)\n def __contains__(s,w): return w in s.w\n def search(s,w): return w in s.w",
        "t=Trie()\nt.insert('apple')\nassert 'apple' in t and 'app' not in t and t.search('apple') and not t.search('x')",
    ),
    "slices": (
        "class S:\n def __init__(s,x): s.x=list(x)\n def __getitem__(s,i): return s.x[i]\n def __setitem__(s,i,v): s.x[i]=v\n def __delitem__(s,i): del s.x[i]\n def __len__(s): return len(s.x)",
        "s=S(range(10))\nassert s[2:5]==[2,3,4] and s[::-1][0]==9 and s[-1]==9\ns[0:2]=[7,8]\nassert s[0]==7\ndel s[0]\nassert len(s)==9 and list(s)==[8,2,3,4,5,6,7,8,9]",
    ),
    "slice result": (
        "def f(a,b): return slice(a,b)",
        "assert f(1,3)==slice(1,3) and [0,1,2,3][f(1,3)]==[1,2]",
    ),
    "repr": (
        "class P:\n def __init__(s,x): s.x=x\n def __repr__(s): return f'P({s.x!r})'\n def __str__(s): return f'<{s.x}>'\n def __format__(s,f): return 'F'+f",
        "p=P(3)\nassert repr(p)=='P(3)' and str(p)=='<3>' and f'{p}'=='F' and f'{p:x}'=='Fx' and f'{p!r}'=='P(3)' and '%s'%p=='<3>' and repr([p])=='[P(3)]'",
    ),
    "isinstance": (
        "class A: pass\nclass B(A): pass\ndef mk(): return B()",
        "b=mk()\nassert isinstance(b,B) and isinstance(b,A) and isinstance(B(),A) and not isinstance(A(),B) and issubclass(B,A) and not isinstance(3,A) and isinstance(b,(int,A)) and not isinstance(b,int)\nassert type(b).__name__=='B' and type(b) is B and b.__class__ is B and b.__class__.__name__=='B' and type(b) == B",
    ),
    "own exception": (
        "class E(Exception): pass\nclass S(E):\n def __init__(s,m,code): super().__init__(m); s.code=code\ndef f(x):\n if x==1: raise E('one')\n raise S('two',7)",
        "try:\n f(1)\n assert 0\nexcept E as e: assert str(e)=='one' and e.args==('one',)\ntry:\n f(2)\nexcept E as e:\n assert isinstance(e,S) and e.code==7 and str(e)=='two' and type(e) is S and type(e).__name__=='S'\nelse: assert 0\ntry:\n f(2)\nexcept ValueError: assert 0\nexcept S: pass\nassert issubclass(S,E) and issubclass(E,Exception)",
    ),
    "own exc of builtin": (
        "class E(ValueError): pass\nclass K(KeyError, AttributeError): pass\ndef f(): raise E('bad')\ndef g(): raise K('k')",
        "for k in (ValueError,E):\n try:\n  f()\n  assert 0\n except k as e: assert 'bad' in str(e)\nfor k in (KeyError,AttributeError,K,LookupError):\n try:\n  g(); assert 0\n except k as e: assert str(e)==\"'k'\"",
    ),
    "unittest raises": (
        "class E(Exception): pass\ndef f(x):\n if x<0: raise E('neg')\n if x==0: raise ValueError('zero')\n return x",
        "import unittest\nt=unittest.TestCase()\nwith t.assertRaises(E): f(-1)\nwith t.assertRaises(ValueError) as c: f(0)\nassert str(c.exception)=='zero'\nt.assertEqual(f(3),3)\nwith t.assertRaisesRegex(E,'ne'): f(-1)\nt.assertIsInstance(f(1),int)\nt.assertAlmostEqual(f(2.0),2.0)\nt.assertIn(f(1),[1,2])",
    ),
    "exc constructed by tests": (
        "class E(Exception):\n def __init__(s,code): super().__init__(f'code {code}'); s.code=code\n def twice(s): return s.code*2",
        "e=E(4)\nassert e.code==4 and str(e)=='code 4' and e.twice()==8 and isinstance(e,Exception) and isinstance(e,E)\ntry: raise E(5)\nexcept E as x: assert x.code==5",
    ),
    "exceptions as values": (
        "def f(): return [ValueError('a'),KeyError('b')]",
        "r=f()\nassert isinstance(r[0],ValueError) and str(r[0])=='a' and r[1].args==('b',)",
    ),
    "json error": (
        "import json\ndef f(s): return json.loads(s)",
        "import json\ntry: f('{')\nexcept json.JSONDecodeError as e: assert e.pos==1 and e.msg.startswith('Expecting')\nelse: assert 0",
    ),
    "key error arg": (
        "def f(d,k): return d[k]",
        "try: f({},(1,2))\nexcept KeyError as e: assert e.args[0]==(1,2)\nelse: assert 0",
    ),
    "asyncio": (
        "import asyncio\nasync def f(x):\n await asyncio.sleep(0.01)\n return x*2",
        "import asyncio\nassert asyncio.run(f(2))==4\nasync def main():\n a=await f(1)\n b,c=await asyncio.gather(f(2),f(3))\n return a,b,c\nassert asyncio.run(main())==(2,4,6)\nassert asyncio.get_event_loop_policy()",
    ),
    "asyncio errors": (
        "import asyncio\nclass Own(Exception): pass\nasync def f():\n raise Own('x')\nasync def slow():\n await asyncio.sleep(5)",
        "import asyncio\ntry: asyncio.run(f()); assert 0\nexcept Own: pass\nasync def m():\n try:\n  await asyncio.wait_for(slow(),0.05)\n except asyncio.TimeoutError: return 1\nassert asyncio.run(m())==1\nasync def g(): return await asyncio.gather(f(),return_exceptions=True)\nassert isinstance(asyncio.run(g())[0],Own)",
    ),
    "asyncio concurrency": (
        "import asyncio\nlog=[]\nasync def w(n,t):\n await asyncio.sleep(t)\n log.append(n)\n return n\ndef get(): return log",
        "import asyncio\nasync def m():\n return await asyncio.gather(w(1,.2),w(2,.1),w(3,.15))\nassert asyncio.run(m())==[1,2,3]\nassert get()==[2,3,1]",
    ),
    "asyncio class": (
        "import asyncio\nclass Q:\n def __init__(s): s.q=asyncio.Queue()\n async def put(s,x): await s.q.put(x)\n async def get(s): return await s.q.get()\n async def __aenter__(s): return s\n async def __aexit__(s,*a): return False\n async def items(s):\n  for i in range(3): yield i\n def __aiter__(s): s.n=0; return s\n async def __anext__(s):\n  s.n+=1\n  if s.n>2: raise StopAsyncIteration\n  return s.n",
        "import asyncio\nasync def m():\n q=Q()\n r=asyncio.create_task(q.get())\n await asyncio.sleep(0)\n await q.put(5)\n assert await r==5\n async with Q() as z: assert isinstance(z,Q)\n assert [i async for i in q.items()]==[0,1,2]\n assert [i async for i in q]==[1,2]\nasyncio.run(m())",
    ),
    "methods of a counter": (
        "from collections import Counter\ndef f(s): return Counter(s)",
        "c=f('aab')\nassert c.most_common(1)==[('a',2)] and c['z']==0 and c=={'a':2,'b':1}\nfrom collections import Counter\nassert c==Counter('aab') and isinstance(c,Counter) and type(c) is Counter",
    ),
    "other collections": (
        "from collections import *\nimport collections\ndef f(): return OrderedDict(a=1,b=2),defaultdict(list,{1:[2]}),deque([1,2],maxlen=2)\nP=namedtuple('P','x y')\ndef g(): return P(1,2)\nfrom typing import NamedTuple\nclass N(NamedTuple):\n a:int\n b:int=2\n def s(self): return self.a+self.b\ndef h(): return N(1)",
        "o,d,q=f()\nassert list(o)==['a','b'] and d[9]==[] and q.maxlen==2\no.move_to_end('a')\nassert list(o)==['b','a']\np=g()\nassert p.x==1 and p==(1,2) and p._replace(x=5).x==5 and p._fields==('x','y') and repr(p)=='P(x=1, y=2)'\nn=h()\nassert n.a==1 and n.s()==3 and n==(1,2) and isinstance(n,N) and isinstance(n,tuple)\nassert P(3,4).y==4 and N(5).s()==7 and N(b=1,a=2)==(2,1)",
    ),
    "zoned": (
        "from datetime import *\nfrom zoneinfo import ZoneInfo\ndef f(): return datetime(2024,1,2,3,tzinfo=timezone.utc)\ndef g(d): return d.astimezone(ZoneInfo('Asia/Tokyo'))\ndef h(d): return d.utcoffset()",
        "from datetime import *\nfrom zoneinfo import ZoneInfo\nassert f()==datetime(2024,1,2,3,tzinfo=timezone.utc) and f().tzinfo is timezone.utc\nassert g(f()).hour==12 and g(f()).tzinfo==ZoneInfo('Asia/Tokyo') and h(g(f()))==timedelta(hours=9)\nassert f().isoformat()=='2024-01-02T03:00:00+00:00'\nassert g(datetime(2024,1,1,tzinfo=timezone(timedelta(hours=-5)))).day==1",
    ),
    "pool": (
        "from multiprocessing import Pool\ndef sq(x): return x*x\ndef f(n):\n with Pool(4) as p: return p.map(sq,range(n))",
        "assert f(5)==[0,1,4,9,16]",
    ),
    "process pool": (
        "from concurrent.futures import ProcessPoolExecutor\ndef sq(x): return x*x\ndef f(n):\n with ProcessPoolExecutor() as p: return list(p.map(sq,range(n)))",
        "assert f(5)==[0,1,4,9,16]",
    ),
    "mp queue": (
        "import multiprocessing as mp\ndef w(q,x): q.put(x*2)\ndef f():\n q=mp.Queue(); ps=[mp.Process(target=w,args=(q,i)) for i in range(3)]\n [p.start() for p in ps]\n r=sorted(q.get() for _ in ps)\n [p.join() for p in ps]\n return r\ndef g():\n v=mp.Value('i',0); l=mp.Lock()\n def inc():\n  for _ in range(100):\n   with l: v.value+=1\n ps=[mp.Process(target=inc) for _ in range(3)]\n [p.start() for p in ps];[p.join() for p in ps]\n return v.value",
        "assert f()==[0,2,4] and g()==300",
    ),
    "linked list of candidate": (
        "class ListNode:\n def __init__(s,val=0,next=None): s.val=val; s.next=next\ndef rev(h):\n p=None\n while h: h.next,p,h=p,h,h.next\n return p",
        "h=ListNode(1,ListNode(2,ListNode(3)))\nr=rev(h)\nout=[]\nwhile r:\n out.append(r.val)\n r=r.next\nassert out==[3,2,1]\nn=ListNode(4)\nassert n.next is None and n.next == None and n != None and (n and True) and n is not None",
    ),
    "linked list of tests": (
        "def rev(h):\n p=None\n while h: h.next,p,h=p,h,h.next\n return p\ndef length(h):\n n=0\n while h is not None: n+=1; h=h.next\n return n",
        "class ListNode:\n def __init__(s,val=0,next=None): s.val=val; s.next=next\nh=ListNode(1,ListNode(2,ListNode(3)))\nassert length(h)==3\nr=rev(h)\nout=[]\nwhile r: out.append(r.val); r=r.next\nassert out==[3,2,1] and length(None)==0",
    ),
    "tree of tests": (
        "def invert(t):\n if t is None: return None\n t.left,t.right=invert(t.right),invert(t.left)\n return t\ndef depth(t): return 0 if not t else 1+max(depth(t.left),depth(t.right))\ndef vals(t): return [] if not t else vals(t.left)+[t.val]+vals(t.right)",
        "from dataclasses import dataclass\nfrom typing import Optional,Any\n@dataclass\nclass T:\n val:int\n left:Any=None\n right:Any=None\nt=T(2,T(1),T(3))\nassert depth(t)==2 and vals(t)==[1,2,3]\nassert invert(t) is t and t.left.val==3 and t==T(2,T(3),T(1))",
    ),
    "dataclass eq": (
        "from dataclasses import dataclass\n@dataclass(frozen=True,order=True)\nclass P:\n x:int\n y:int=0",
        "assert P(1,2)==P(1,2) and P(1,2)!=P(1,3) and P(1)<P(2) and len({P(1),P(1),P(2)})==2 and repr(P(1,2))=='P(x=1, y=2)' and sorted([P(2),P(1)])[0].x==1 and max(P(1),P(3)).x==3\ntry: P(1).x=3\nexcept AttributeError: pass\nelse: assert 0",
    ),
    "enum": (
        "from enum import Enum,IntEnum\nclass C(Enum):\n RED=1\n BLUE=2\nclass N(IntEnum):\n A=1\n B=2\ndef f(): return C.RED\ndef g(): return N.B",
        "assert f() is C.RED and f()==C.RED and f()!=C.BLUE and f().value==1 and f().name=='RED' and C(2) is C.BLUE and C['RED'] is C.RED and [c.name for c in C]==['RED','BLUE'] and len(C)==2 and isinstance(f(),C)\nassert g()==2 and g() is N.B and g().name=='B' and g()+1==3 and isinstance(g(),int) and N.A<N.B and {f():1}[C.RED]==1 and f() in (C.RED,) and f() in {C.RED}",
    ),
    "stack list subclass": (
        "class Stack(list):\n def push(s,x): s.append(x)\n def peek(s): return s[-1]\ndef f(): return Stack([1,2])",
        "s=Stack()\ns.push(1);s.push(2)\nassert s.peek()==2 and s.pop()==2 and len(s)==1 and s==[1] and 1 in s and list(s)==[1] and isinstance(s,list) and isinstance(s,Stack) and s\nassert f()==[1,2] and f()[0]==1 and f()+[3]==[1,2,3] and [0]+f()==[0,1,2] and sorted(f())==[1,2] and f()!=[1] and [1,2]==f()\ns.append(9)\nassert s[-1]==9 and not Stack()",
    ),
    "dict subclass": (
        "class D(dict):\n def __missing__(s,k): return 'no'\nclass Cfg(dict):\n def __getattr__(s,k): return s[k]",
        "d=D(a=1)\nassert d['a']==1 and d['z']=='no' and d=={'a':1} and 'a' in d and dict(d)=={'a':1} and list(d.items())==[('a',1)] and isinstance(d,dict)\nc=Cfg(x=5)\nassert c.x==5 and c['x']==5",
    ),
    "str int subclass": (
        "class S(str):\n def shout(s): return s.upper()+'!'\nclass M(int):\n def __str__(s): return f'${int(s)}'\ndef f(): return S('ab')",
        "assert f()=='ab' and f().shout()=='AB!' and S('x').shout()=='X!' and f()+'c'=='abc' and isinstance(f(),S) and ''.join([f(),'z'])=='abz' and str(M(3))=='$3' and M(3)+1==4 and M(3)==3",
    ),
    "context manager": (
        "class T:\n def __init__(s): s.log=[]\n def __enter__(s): s.log.append('in'); return s\n def __exit__(s,t,v,b): s.log.append(t.__name__ if t else 'out'); return t is ValueError\nfrom contextlib import contextmanager\n@contextmanager\ndef cm(x):\n yield x*2",
        "with T() as t: pass\nassert t.log==['in','out']\nwith T() as t: raise ValueError('x')\nassert t.log==['in','ValueError']\nwith cm(3) as v: assert v==6\ntry:\n with T(): raise KeyError(1)\n assert 0\nexcept KeyError: pass",
    ),
    "operators": (
        "class V:\n def __init__(s,x,y): s.x,s.y=x,y\n def __add__(s,o): return V(s.x+o.x,s.y+o.y)\n def __mul__(s,k): return V(s.x*k,s.y*k)\n __rmul__=__mul__\n def dot(s,o): return s.x*o.x+s.y*o.y\n def __matmul__(s,o): return s.dot(o)\n def __abs__(s): return (s.x**2+s.y**2)**.5\n def __neg__(s): return V(-s.x,-s.y)\n def __iter__(s): return iter((s.x,s.y))\n def __iadd__(s,o): s.x+=o.x; return s\n def __bool__(s): return bool(s.x or s.y)",
        "v=V(1,2)+V(3,4)\nassert v.x==4 and v.y==6 and (2*v).x==8 and (v*2).y==12 and V(1,2)@V(3,4)==11 and abs(V(3,4))==5 and (-v).x==-4 and tuple(v)==(4,6)\nw=V(1,1)\nu=w\nw+=V(2,0)\nassert w.x==3 and u is w\na,b=v\nassert (a,b)==(4,6)",
    ),
    "iterators of its own": (
        "class R:\n def __init__(s,n): s.n=n\n def __iter__(s): s.i=0; return s\n def __next__(s):\n  if s.i>=s.n: raise StopIteration\n  s.i+=1\n  return s.i\ndef gen(n):\n for i in range(n): yield i\ndef inf():\n i=0\n while 1: yield i; i+=1",
        "assert list(R(3))==[1,2,3] and sum(R(4))==10 and next(iter(R(1)))==1\nr=iter(R(1)); next(r)\ntry: next(r); assert 0\nexcept StopIteration: pass\nimport itertools\nassert list(itertools.islice(inf(),3))==[0,1,2]\ng=gen(2)\nassert next(g)==0 and next(g)==1 and next(g,None) is None\nassert [a for a,_ in zip(inf(),range(3))]==[0,1,2] and list(map(lambda a,b:a+b,gen(2),[1,2]))==[1,3] and dict(enumerate(gen(2)))=={0:0,1:1}",
    ),
    "generator send": (
        "def acc():\n t=0\n while True:\n  x=yield t\n  if x is None: return t\n  t+=x",
        "g=acc()\nassert next(g)==0 and g.send(3)==3 and g.send(4)==7\ng.close()",
    ),
    "decorators": (
        "import functools\ndef memo(f):\n c={}\n @functools.wraps(f)\n def w(*a):\n  if a not in c: c[a]=f(*a)\n  return c[a]\n w.cache=c\n return w\ndef twice(f): return lambda x:f(f(x))\ndef compose(*fs):\n def g(x):\n  for f in reversed(fs): x=f(x)\n  return x\n return g\ndef ident(x): return x\ndef retry(n,exc=Exception):\n def d(f):\n  def w(*a,**k):\n   for i in range(n):\n    try: return f(*a,**k)\n    except exc:\n     if i==n-1: raise\n  return w\n return d",
        "calls=[]\n@memo\ndef sq(x):\n 'doc'\n calls.append(x)\n return x*x\nassert sq(3)==9 and sq(3)==9 and calls==[3] and sq.__name__=='sq' and sq.__doc__=='doc' and sq.cache=={(3,):9}\nassert twice(lambda x:x+1)(1)==3 and compose(str,abs)(-2)=='2' and ident(len) is len and ident(calls)==[3]\ndef h(): pass\nassert ident(h) is h\nclass Boom(Exception): pass\nn=[0]\n@retry(3,Boom)\ndef flaky(a,*,b=1):\n n[0]+=1\n if n[0]<3: raise Boom('b')\n return a+b\nassert flaky(1,b=5)==6 and n==[3]\n@retry(2)\ndef bad(): raise Boom('always')\ntry: bad(); assert 0\nexcept Boom as e: assert str(e)=='always'",
    ),
    "kwargs callbacks": (
        "def f(g): return g(1,b=2)\ndef each(xs,visit):\n for x in xs: visit(x)\ndef srt(xs,key=None,reverse=False): return sorted(xs,key=key,reverse=reverse)\ndef fill(acc,g): g(acc); return acc",
        "assert f(lambda a,b:a+b)==3\nout=[]\neach([1,2],out.append)\nassert out==[1,2] and srt([3,1],key=lambda x:-x)==[3,1] and srt(['b','A'],key=str.lower)==['A','b']\nimport operator,functools\nassert srt([(1,2),(0,3)],key=operator.itemgetter(1))==[(1,2),(0,3)]\nassert f(functools.partial(lambda c,a,b:a+b+c,10))==13\nassert fill([],lambda a:a.append(1))==[1]",
    ),
    "matches": (
        "import re\ndef f(s): return re.match(r'(\\w+)@(\\w+)',s)",
        "assert f('a@b') and not f('x') and f('a@b').group(1)=='a' and f('a@b')[2]=='b' and f('q') is None and f('a@b').groups()==('a','b')",
    ),
    "views": (
        "def f(d): return d.keys(),d.values(),d.items()",
        "k,v,i=f({'a':1})\nassert k=={'a'} and list(v)==[1] and list(i)==[('a',1)] and sorted(k)==['a'] and dict(i)=={'a':1}",
    ),
    "properties statics": (
        "class A:\n n=0\n def __init__(s): A.n+=1; s._v=1\n @property\n def v(s): return s._v\n @v.setter\n def v(s,x):\n  if x<0: raise ValueError('neg')\n  s._v=x\n @classmethod\n def make(c): return c()\n @staticmethod\n def st(x): return x+1\n def __len__(s): return 3\n def __getattr__(s,k): raise AttributeError(k)",
        "a=A()\na.v=5\nassert a.v==5 and a._v==5 and A.st(1)==2 and isinstance(A.make(),A) and A.n==2 and len(a)==3\ntry: a.v=-1; assert 0\nexcept ValueError: pass\nassert hasattr(a,'v') and not hasattr(a,'zz') and getattr(a,'qq',7)==7\ndel a._v\nassert callable(A) and not callable(a)",
    ),
    "abc": (
        "from abc import ABC,abstractmethod\nclass Shape(ABC):\n @abstractmethod\n def area(s): ...\nclass Sq(Shape):\n def __init__(s,a): s.a=a\n def area(s): return s.a**2",
        "assert Sq(2).area()==4 and isinstance(Sq(1),Shape)\ntry: Shape(); assert 0\nexcept TypeError: pass\nassert [s.area() for s in (Sq(1),Sq(3))]==[1,9]",
    ),
    "lru cache": (
        "from functools import lru_cache\n@lru_cache(None)\ndef fib(n): return n if n<2 else fib(n-1)+fib(n-2)",
        "assert fib(50)==12586269025 and fib.cache_info().misses==51\nfib.cache_clear()\nassert fib.__name__=='fib'",
    ),
    "values of the library": (
        "from fractions import Fraction\nfrom decimal import Decimal\nimport uuid,pathlib\ndef f(): return Fraction(1,3),Decimal('1.10'),2+3j,uuid.UUID(int=5),pathlib.Path('/a')/'b'",
        "from fractions import Fraction\nfrom decimal import Decimal\na,b,c,d,e=f()\nassert a==Fraction(1,3) and str(b)=='1.10' and c.imag==3 and d.int==5 and e.name=='b' and a.numerator==1",
    ),
    "library names without import": (
        "from collections import Counter,OrderedDict,deque\nfrom typing import List\nfrom decimal import Decimal\ndef f(s): return Counter(s)",
        "assert f('aa')==Counter('aa') and f('ab')==Counter({'a':1,'b':1}) and isinstance(f(''),Counter)",
    ),
    "param same name": (
        "def add(a,b): return a+b",
        "def check(add):\n assert add(1,2)==3\ncheck(add)",
    ),
    "comprehension name": (
        "def f(x): return x",
        "assert [f(x) for x in range(3)]==[0,1,2]\ndef t():\n x=f(1)\n return x\nassert t()==1\nassert (lambda x:f(x))(2)==2",
    ),
    "global state": (
        "counter=0\ndef inc():\n global counter\n counter+=1\n return counter",
        "assert inc()==1 and inc()==2",
    ),
    "copy": (
        "class N:\n def __init__(s): s.c=[1]\n",
        "import copy\nn=N()\nm=copy.deepcopy(n)\nm.x=5\nassert m is not n and not hasattr(n,'x') and copy.copy(n).c==[1]",
    ),
    "getsizeof": (
        "import sys\ndef f(t): return sys.getsizeof(t)",
        "import sys\nassert f((1,2))==sys.getsizeof((1,2))",
    ),
    "closures": (
        "def counter():\n n=0\n def inc():\n  nonlocal n\n  n+=1\n  return n\n return inc\ndef curry(f): return lambda a:lambda b:f(a,b)",
        "c=counter()\nassert c()==1 and c()==2 and curry(lambda a,b:a*b)(3)(4)==12 and callable(c)",
    ),
    "graph": (
        "class G:\n def __init__(s): s.adj={}\n def add(s,a,b): s.adj.setdefault(a,[]).append(b); return s\n def __getitem__(s,k): return s.adj[k]\n def __iter__(s): return iter(s.adj)",
        "g=G().add(1,2).add(1,3)\nassert g[1]==[2,3] and list(g)==[1] and g.adj=={1:[2,3]} and 1 in g and 5 not in g\ntry: g[9]; assert 0\nexcept KeyError: pass",
    ),
    "stack class": (
        "class Stack:\n def __init__(s): s.i=[]\n def push(s,x): s.i.append(x)\n def pop(s):\n  if not s.i: raise IndexError('empty')\n  return s.i.pop()\n def __len__(s): return len(s.i)",
        "s=Stack()\nassert not s and len(s)==0\ns.push(1)\nassert s and s.pop()==1\ntry: s.pop(); assert 0\nexcept IndexError as e: assert str(e)=='empty'",
    ),
    "io": (
        "def f(fh): return [l.strip() for l in fh]\ndef w(fh): fh.write('x')",
        "import io\nassert f(io.StringIO('a\\nb'))==['a','b']\nb=io.StringIO()\nw(b)\nassert b.getvalue()=='x'",
    ),
    "namedtuple arg": (
        "def f(p): return p.x+p.y\ndef g(d): return d.name",
        "from collections import namedtuple\nP=namedtuple('P','x y')\nassert f(P(1,2))==3\nfrom types import SimpleNamespace as S\nassert g(S(name='n'))=='n'",
    ),
    "enum arg": (
        "def f(c): return c.value, c.name",
        "from enum import Enum\nclass C(Enum):\n A=1\nassert f(C.A)==(1,'A')",
    ),
    "mutual": (
        "def is_even(n): return n==0 or is_odd(n-1)\ndef is_odd(n): return n!=0 and is_even(n-1)",
        "assert is_even(10) and not is_odd(10) and is_even(3) is False",
    ),
    "sort tests objects": (
        "def oldest(ps): return max(ps,key=lambda p:p.age)\ndef names(ps): return sorted(p.name for p in ps)\ndef total(ps): return sum(p.age for p in ps)",
        "class P:\n def __init__(s,n,a): s.name,s.age=n,a\n def __lt__(s,o): return s.age<o.age\nps=[P('b',3),P('a',5)]\nassert oldest(ps) is ps[1] and names(ps)==['a','b'] and total(ps)==8",
    ),
    "doc attrs": (
        "def f(x:int)->int:\n 'the doc'\n return x\nf.level=3",
        "assert f.__doc__=='the doc' and f.__name__=='f' and f.level==3 and f.__annotations__['x'] is int and callable(f)\nf.level=4\nassert f.level==4\nassert f(2)==2",
    ),
    "time": (
        "import time\ndef f():\n time.sleep(.05)\n return time.localtime(0).tm_year",
        "assert f()==1970",
    ),
    "exit exc": (
        "import sys\ndef f(): sys.exit(3)",
        "try: f(); assert 0\nexcept SystemExit as e: assert e.code==3",
    ),
    "exception group": (
        "def f(): raise ExceptionGroup('g',[ValueError('a')])",
        "try: f()\nexcept* ValueError as g: assert str(g.exceptions[0])=='a'",
    ),
    "bytes and numbers": (
        "def f(): return b'a',bytearray(b'b'),memoryview(b'c').tobytes(),2**80,-0.0,float('nan')",
        "a,b,c,d,e,g=f()\nassert (a,b,c,d)==(b'a',bytearray(b'b'),b'c',2**80) and str(e)=='-0.0' and g!=g",
    ),
    "threads in tests": (
        "import threading\nclass C:\n def __init__(s): s.n=0; s.l=threading.Lock()\n def inc(s):\n  with s.l: s.n+=1",
        "import threading\nc=C()\nts=[threading.Thread(target=c.inc) for _ in range(8)]\n[t.start() for t in ts];[t.join() for t in ts]\nassert c.n==8",
    ),
    "callbacks in threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef pmap(f,xs):\n with ThreadPoolExecutor(4) as p: return list(p.map(f,xs))",
        "assert pmap(lambda x:x+1,range(10))==list(range(1,11))",
    ),
    "type results": (
        "def f(x): return type(x)\nclass A: pass\ndef g(): return A",
        "assert f(3) is int and f('a')==str and f(3) in (int,float) and g() is A",
    ),
    "inspect": (
        "async def f(): pass\ndef g(a,b=1,*c,**d): pass",
        "import inspect\nassert list(inspect.signature(g).parameters)==['a','b','c','d'] and g(1) is None",
    ),
    "asdict": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n x:int\n y:int",
        "from dataclasses import asdict,is_dataclass\nassert asdict(P(1,2))=={'x':1,'y':2} and is_dataclass(P(1,2))",
    ),
    "stdout": (
        "def f(): print('hi')",
        "import io,contextlib\nb=io.StringIO()\nwith contextlib.redirect_stdout(b): f()\nassert b.getvalue()=='hi\\n'",
    ),
    "own type arg class": (
        "def f(c): return c(3)\ndef g(o): return isinstance(o,list)",
        "class K:\n def __init__(s,v): s.v=v\nassert f(K).v==3 and f(str)=='3' and g([])",
    ),
    # In the manner of LiveCodeBench and of classes to complete.
    "a class Solution": (
        "from typing import *\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        d={}\n        for i,x in enumerate(nums):\n            if target-x in d: return [d[target-x],i]\n            d[x]=i",
        "assert Solution().twoSum([2,7,11,15],9)==[0,1]\ns=Solution()\nassert s.twoSum(nums=[3,3],target=6)==[0,1]",
    ),
    "a cache by its operations": (
        "class LRUCache:\n    def __init__(self,c):\n        from collections import OrderedDict\n        self.c=c; self.d=OrderedDict()\n    def get(self,k):\n        if k not in self.d: return -1\n        self.d.move_to_end(k); return self.d[k]\n    def put(self,k,v):\n        self.d[k]=v; self.d.move_to_end(k)\n        if len(self.d)>self.c: self.d.popitem(last=False)",
        "ops=['put','put','get','put','get']\nargs=[[1,1],[2,2],[1],[3,3],[2]]\nobj=LRUCache(2)\nout=[getattr(obj,o)(*a) for o,a in zip(ops,args)]\nassert out==[None,None,1,None,-1], out\nassert obj.d",
    ),
    "unittest": (
        "def f(x): return x",
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1),1)\n    def test_b(self):\n        with self.assertRaises(TypeError): f()\nr=unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\nassert r.wasSuccessful()",
    ),
    "functions test_*": (
        "def f(x): return x",
        "def test_a():\n    assert f(1)==1\ndef test_b():\n    assert f('a')=='a'\nfor n,t in list(globals().items()):\n    if n.startswith('test_'): t()",
    ),
    "a matrix in place": (
        "def rotate(m):\n    m[:]=[list(r) for r in zip(*m[::-1])]",
        "m=[[1,2],[3,4]]\nrotate(m)\nassert m==[[3,1],[4,2]]",
    ),
    "a tree by its breadth": (
        "class TreeNode:\n    def __init__(self,val=0,left=None,right=None): self.val,self.left,self.right=val,left,right\ndef build(xs):\n    return TreeNode(xs[0],TreeNode(xs[1]),TreeNode(xs[2]))",
        "t=build([1,2,3])\nassert t.left.val==2 and t.right.left is None\nfrom collections import deque\nq=deque([t]); out=[]\nwhile q:\n    n=q.popleft()\n    if n:\n        out.append(n.val); q.append(n.left); q.append(n.right)\nassert out==[1,2,3]",
    ),
    "a dictionary as JSON": (
        "def f(n):\n    return {i:[j for j in range(i)] for i in range(n)}",
        'r=f(3)\nfor k,v in r.items(): assert len(v)==k\nassert sorted(r)==[0,1,2]\nimport json\nassert json.dumps(r)==\'{"0": [], "1": [0], "2": [0, 1]}\'',
    ),
    "permutations": (
        "from itertools import permutations\ndef f(x): return permutations(x)",
        "assert list(f([1,2]))==[(1,2),(2,1)] and set(f('ab'))=={('a','b'),('b','a')} and len(list(f([1,2,3])))==6",
    ),
    "lazy results": (
        "def f(x): return map(str,x)\ndef g(x): return filter(None,x)\ndef h(x): return reversed(x)\ndef z(a,b): return zip(a,b)",
        "assert list(f([1]))==['1'] and list(g([0,1]))==[1] and ''.join(h('ab'))=='ba' and dict(z('ab',[1,2]))=={'a':1,'b':2} and next(f([5]))=='5'",
    ),
    "random numbers": (
        "import random\nrandom.seed(3)\ndef f(n): return [random.random() for _ in range(n)]",
        "r=f(5)\nassert len(r)==5 and all(0<=x<1 for x in r) and isinstance(r[0],float)",
    ),
    "None for a result": (
        "def f(a,b):\n    try: return a/b\n    except ZeroDivisionError: return None",
        "assert f(1,0) is None and f(1,2)==0.5",
    ),
    "a type is checked": (
        "def f(x):\n    if not isinstance(x,int): raise TypeError('int wanted')\n    return x",
        "try:\n    f('a')\nexcept TypeError as e:\n    assert 'int' in str(e)\nelse:\n    raise AssertionError('no error')\nimport pickle\nassert f(3)==3",
    ),
    "constants": (
        "import string\ndef f(s): return s.translate(str.maketrans('','',string.punctuation))\nPI=3.14\nNAMES=('a','b')",
        "assert f('a,b!')=='ab' and PI==3.14 and NAMES[0]=='a' and len(NAMES)==2",
    ),
    "lists as matrices": (
        "def f(m): return [[sum(a*b for a,b in zip(r,c)) for c in zip(*m)] for r in m]",
        "import numpy as np\nm=[[1,2],[3,4]]\nassert np.array_equal(f(m),np.array(m)@np.array(m)) and np.allclose(f(m),np.matmul(m,m))\nnp.testing.assert_array_equal(f(m),[[7,10],[15,22]])\nassert np.mean(f(m))==13.5",
    ),
    "close floats": (
        "def f(x): return x**0.5",
        "import math\nassert math.isclose(f(2),1.41421356,rel_tol=1e-6) and round(f(2),2)==1.41 and abs(f(4)-2)<1e-9 and f(4).is_integer()",
    ),
    "a matrix class": (
        "class Matrix:\n    def __init__(s,r): s.r=r\n    def __getitem__(s,ij): return s.r[ij[0]][ij[1]]\n    def __matmul__(s,o): return Matrix([[sum(a*b for a,b in zip(r,c)) for c in zip(*o.r)] for r in s.r])\n    def __eq__(s,o): return s.r==o.r\n    @property\n    def T(s): return Matrix([list(c) for c in zip(*s.r)])",
        "m=Matrix([[1,2],[3,4]])\nassert m[0,1]==2 and (m@m).r==[[7,10],[15,22]] and m.T.r==[[1,3],[2,4]] and m==Matrix([[1,2],[3,4]])",
    ),
    "a list by links": (
        "class Node:\n    __slots__=('v','n')\n    def __init__(s,v,n=None): s.v=v;s.n=n\nclass LL:\n    def __init__(s): s.head=None\n    def push(s,v): s.head=Node(v,s.head)\n    def __iter__(s):\n        c=s.head\n        while c: yield c.v; c=c.n\n    def __len__(s): return sum(1 for _ in s)\n    def __reversed__(s): return iter(list(s)[::-1])",
        "l=LL()\nfor i in range(3): l.push(i)\nassert list(l)==[2,1,0] and len(l)==3 and list(reversed(l))==[0,1,2] and 1 in l and l.head.n.v==1 and max(l)==2 and sorted(l)==[0,1,2] and [*l]==[2,1,0]",
    ),
    "a context manager's value": (
        "from contextlib import contextmanager\nimport time\n@contextmanager\ndef timer():\n    r={}\n    t=time.perf_counter()\n    yield r\n    r['t']=time.perf_counter()-t",
        "with timer() as r: pass\nassert 't' in r or r=={} ",
    ),
    "observers": (
        "class Obs:\n    def __init__(s): s.h=[]\n    def on(s,f): s.h.append(f)\n    def emit(s,*a,**k): return [f(*a,**k) for f in s.h]",
        "o=Obs()\ngot=[]\no.on(got.append)\no.on(lambda x:x*2)\nassert o.emit(3)==[None,6] and got==[3]",
    ),
    "abstract, single": (
        "import abc\nclass A(abc.ABC):\n    @property\n    @abc.abstractmethod\n    def n(self): ...\nclass B(A):\n    n=5\nSINGLE=B()\nclass S:\n    _i=None\n    def __new__(c):\n        if c._i is None: c._i=super().__new__(c)\n        return c._i",
        "assert B().n==5 and SINGLE.n==5 and S() is S() and isinstance(SINGLE,A)\ntry:\n    A()\n    assert False\nexcept TypeError: pass",
    ),
    "printed lines": (
        "def fizz(n):\n    for i in range(1,n+1): print('Fizz' if i%3==0 else i)",
        "import io\nfrom contextlib import redirect_stdout\nf=io.StringIO()\nwith redirect_stdout(f): fizz(3)\nassert f.getvalue().split()==['1','2','Fizz']",
    ),
}

HELPED = {
    "own copy of the problem's helper": (
        "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\ndef find(xs):\n    return -xs[0] / xs[1]",
        "def check(candidate):\n    for xs in ([1, 2], [3, 5]):\n        assert abs(poly(xs, candidate(xs))) < 1e-6\ncheck(find)",
        "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n",
        "find",
    ),
    "imports before the function, and a decorator that goes on in the answer": (
        "import math\nfrom functools import lru_cache\n@lru_cache\ndef f(x):\n    return math.sqrt(x)",
        "assert math.isclose(f(2), 2 ** 0.5)",
        "import math\nfrom functools import lru_cache\n@lru_cache\n",
        "f",
    ),
    "a class before the function": (
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
        "def reverse(node):\n    new = None\n    while isinstance(node, Node):\n        new, node = Node(node.value, new), node.next\n"
        "    return new",
        "def values(node):\n    found = []\n    while node:\n        assert isinstance(node, Node)\n"
        "        found.append(node.value)\n        node = node.next\n    return found\n"
        "assert values(reverse(Node(1, Node(2)))) == [2, 1]",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n",
        "reverse",
    ),
    "a name of Python's own beside others": (
        "def sum(a, b):\n    return a + b",
        "assert abs(sum(0.1, 0.2) - 0.3) < 1e-6",
        "",
        "sum",
    ),
}
"""Programs, their tests, what stands before them in their problem, and the function asked for."""

LISTED = {
    "derive": (
        "class Base:\n def hi(s): return 'hi '+s.name()",
        "class X(Base):\n def name(s): return 'x'\nassert X().hi()=='hi x'",
    ),
    "vec eq derived": (
        "class V:\n def __init__(s,x): s.x=x\n def __add__(s,o): return V(s.x+o.x)\n def __eq__(s,o): return s.x==o.x",
        "assert V(1)+V(2)==V(3)",
    ),
    "bool dunder": (
        "class A:\n def __init__(s,v): s.v=v\n def __bool__(s): return s.v>0",
        "assert A(1) and not A(0)",
    ),
    "seed": (
        "import random\ndef f(): return random.random()",
        "import random\nrandom.seed(1)\na=f()\nrandom.seed(1)\nassert a==f()",
    ),
    "mutating results": (
        "class A:\n def __init__(s): s.items=[]",
        "a=A()\na.items.append(1)\nassert a.items==[1]",
    ),
    "mutate and return": (
        "def f(x):\n x.sort()\n return x",
        "a=[3,1]\nassert f(a)==[1,3] and a==[1,3]",
    ),
    "mock": (
        "def f(db): return db.get(1)+1",
        "from unittest.mock import Mock\nm=Mock()\nm.get.return_value=4\nassert f(m)==5\nm.get.assert_called_once_with(1)",
    ),
    "patch time": (
        "import time\ndef f(): return time.time()",
        "from unittest.mock import patch\nwith patch('time.time',return_value=5): assert f()==5",
    ),
    "input": (
        "def f(): return input()",
        "import io,sys\nsys.stdin=io.StringIO('yo\\n')\nassert f()=='yo'",
    ),
}
"""Right programs that fail: docs/evaluation.md lists them."""

SCRIPTS = [
    ("import sys\ninput=sys.stdin.readline\nn=int(input())\nprint(sum(map(int,input().split())))", "2\n1 2\n", "3"),
    ("import sys\ndata=sys.stdin.buffer.read().split()\nsys.stdout.write(str(len(data)))", "a b c", "3"),
    ("print(open(0).read().upper())", "ab", "AB"),
    (
        "import sys,threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\ndef main():\n def f(n): return 0 if n==0 else 1+f(n-1)\n print(f(50000))\nt=threading.Thread(target=main)\nt.start()\nt.join()",
        "",
        "50000",
    ),
    ("import os\nos.write(1,b'hi')", "", "hi"),
    ("def main():\n  print(input())\nif __name__=='__main__':\n  main()", "x", "x"),
    ("import resource,sys\nresource.setrlimit(resource.RLIMIT_STACK,(2**26,2**26))\nprint(1)", "", "1"),
    (
        "from multiprocessing import Pool\ndef f(x): return x*x\nif __name__=='__main__':\n  with Pool(2) as p: print(p.map(f,[1,2]))",
        "",
        "[1, 4]",
    ),
    ("import asyncio\nasync def m(): print('a')\nasyncio.run(m())", "", "a"),
    (
        "from functools import lru_cache\nimport heapq,bisect,itertools,collections,math,string,re\nprint(math.comb(5,2))",
        "",
        "10",
    ),
    ("import numpy as np\nprint(np.array(input().split(),dtype=int).sum())", "1 2 3", "6"),
    ("print(*sorted(map(int,__import__('sys').stdin.read().split())))", "3 1 2", "1 2 3"),
    ("import sys\nprint('x',file=sys.stderr)\nprint('y')\nsys.exit()", "", "y"),
    ("import time,datetime\nprint(datetime.date(2024,1,1).strftime('%A'))", "", "Monday"),
    (
        "import sys\nfrom typing import *\nclass Solution:\n def f(self,x:List[int])->int: return sum(x)\nprint(Solution().f(eval(input())))",
        "[1,2]",
        "3",
    ),
]
"""Programs that read standard input, what they read and what they print."""
