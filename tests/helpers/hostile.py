"""Templates that would take a machine's time or memory, each in another way, and how the refusal of each begins."""

LONG, LARGE, REFUSES = "runs for more than ", "takes more than ", "refuses the messages: "
EITHER = f"({LONG}|{LARGE}|{REFUSES})"

GROWING = (
    "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = SUM %}{% endfor %}{{ n.s | length }}"
)
NESTED = "{% set n = namespace(a=[0]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"

HOSTILE = {
    "a long range": ("{% for a in range(10**9) %}x{% endfor %}", REFUSES),
    "loops within loops": ("{% for m in 'abc' %}" * 25 + "x" + "{% endfor %}" * 25, f"({LONG}|is no valid jinja)"),
    "a recursive loop of no end": ("{% for m in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", f"({REFUSES}|{LONG})"),
    "loops that print nothing": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        LONG,
    ),
    "loops that choose nothing": (
        "{% for a in range(9**5) %}{% for b in range(9**5) if false %}{% endfor %}{% endfor %}",
        LONG,
    ),
    "a text many times": ("{{ 'x' * 10**10 }}", LARGE),
    "a list many times": ("{{ [0] * 10**10 }}", LARGE),
    "as wide as that": ('{{ "%1000000000d" % 1 }}', LARGE),
    "formatted as wide": ("{{ '{:>1000000000}'.format(1) }}", LARGE),
    "a power": ("{% set x = 9**9**6 %}{{ x ** x }}", f"({LONG}|{REFUSES})"),
    "powers of powers": ("{{ 7 ** (7 ** 9) % 10 }}", LONG),
    "a shift": ("{{ 2 ** (8 * 10**9) }}", f"({LONG}|{LARGE})"),
    "centred": ("{{ 'x' | center(10**10) }}", LARGE),
    "centred by a method": ("{{ 'x'.center(10**10) }}", LARGE),
    "filled with zeros": ("{{ 'x'.zfill(4 * 10**9) }}", LARGE),
    "tabs": ("{{ '\t'.expandtabs(2**31 - 1) }}", LARGE),
    "indented": ("{{ ('a\n' * 100000) | indent(10**6) }}", EITHER),
    "a number to text": ("{{ (9 ** (10**6)) | string }}", EITHER),
    "doubled": (GROWING.replace("SUM", "n.s + n.s"), LARGE),
    "doubled by ~": (GROWING.replace("SUM", "n.s ~ n.s"), LARGE),
    "doubled by join": (GROWING.replace("SUM", "[n.s, n.s] | join"), LARGE),
    "doubled by replace": (GROWING.replace("SUM", "n.s.replace('x', 'xx')"), EITHER),
    "doubled by blocks": (
        "{% set s = 'xx' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60 + "{{ s | length }}",
        EITHER,
    ),
    "a list that grows": (
        "{% set n = namespace(a=[]) %}{% for i in range(10**5) %}{% set n.a = n.a + [i] * 999 %}{% endfor %}",
        EITHER,
    ),
    "a list in itself, printed": (NESTED + "{{ n.a }}", EITHER),
    "a list in itself, as JSON": (NESTED + "{{ n.a | tojson }}", EITHER),
    "two of them, compared": (NESTED + "{% set a = n.a %}" + NESTED + "{{ a == n.a }}", EITHER),
    "macros that call each other": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        LONG,
    ),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSES),
    "filters within filters": (
        "{{ range(99999) | map('string') | list | sort | join | list | map('center', 99999) | join }}",
        EITHER,
    ),
    "many batches": ("{{ [0] | slice(10**9) | list }}", EITHER),
    "much nonsense": ("{{ lipsum(n=10**6, html=false) }}", EITHER),
    "rounded": ("{{ 1.5 | round(10**9, 'ceil') }}", EITHER),
    "written much": ("{% for a in range(1700) %}{{ 'x' * 10**4 }}{% endfor %}", f"{REFUSES}it writes more"),
}
