"""README and the pages in benchmark/ and tests/: README is short, links and paths lead somewhere, commands know their flags."""

import ast
import collections
import fnmatch
import functools
import glob
import itertools
import pathlib
import re
import shlex
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("trudi_*.py"))
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "benchmark").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`([^`]+)`")
# Code that looks like a path and is none of the repository: metrics, what runs write, other folders of a machine.
ELSEWHERE = re.compile(
    r"(charts|losses|eval|trust_region|entropy|critic|Episode_Reward|Curriculum)/.*|runs/.*|RUN/.*|~/.*|site-packages/.*|"
    r"(seed_\*/)?metrics\.jsonl|args\.json|checkpoints/|videos/|policy\.onnx")
ENDS = ("/", ".py", ".md", ".json", ".jsonl", ".csv", ".png", ".txt", ".toml")


def name(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


# -------------------------------------------------------------------------------------------------------------- README
def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_equation_of_the_table_is_marked_where_it_says(path):
    table = dict(re.findall(r"^\| (\d+) \|.*\| `(\w+)` \|$", (ROOT / "README.md").read_text(), re.M))
    lines = path.read_text().splitlines()
    marks = {(number, i) for i, line in enumerate(lines, 1) if "#" in line
             for number in re.findall(r"Eq\. (\d+)", line.split("#", 1)[1])}
    assert len(table) > 15
    outer = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)]
    found = {number: node.name for number, i in marks for node in outer if node.lineno <= i <= node.end_lineno}
    assert found == table


def test_every_erratum_is_told():
    page = (ROOT / "benchmark" / "errata.md").read_text()
    assert re.findall(r"^\| (E\d+) \|", page, re.M) == [f"E{i}" for i in range(1, 20)]


def test_every_result_says_where_it_was_made():
    text = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ")]
    assert len(rows) > 5 and rows[0][1] == "on"
    for row in rows[1:]:
        assert row[1].startswith(("CPU", "GPU")), row


def test_pages_count_what_a_copy_can_do_without():
    from test_copies import without_infrastructure

    text = (ROOT / "trudi_mjx.py").read_text()
    page = (ROOT / "benchmark" / "copying.md").read_text()
    remaining, cuts = without_infrastructure(text)
    told = re.search(r"some ([\d,]+) lines of ([\d,]+) remain after (\d+) cuts", " ".join(page.split()))
    for number, whole in zip(told.groups(), (remaining, text), strict=False):
        assert abs(int(number.replace(",", "")) - whole.count("\n")) <= 10
    assert int(told[3]) == cuts == len(re.findall(r"^\d+\. ", page, re.M))
    assert f"the {cuts} cuts" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", ["benchmark", "tests"])
def test_every_file_is_on_the_page_of_its_folder(folder):
    """Itself, a pattern of its name, or a folder in which it is."""
    page = ROOT / folder / "README.md"
    told = set(CODE.findall(FENCED.sub("", page.read_text())))
    for path in page.parent.rglob("*.py"):
        own = path.relative_to(page.parent)
        names = {str(own), *(f"{folder}/" for folder in own.parents)}
        assert path.name == "__init__.py" or any(fnmatch.filter(names, pattern) for pattern in told), own


# --------------------------------------------------------------------------------------------------------------- links
def anchors(text):
    """Of a page's headings, as GitHub makes them: in lower case, without punctuation, a hyphen for a space; then numbered."""
    found, seen = [], collections.Counter()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def lost_links(page):
    """Targets of links that lead nowhere; of the web's only the form is looked at."""
    text = CODE.sub("code", FENCED.sub("", page.read_text()))
    lost = []
    for target in re.findall(r"\]\(([^)]*)\)", text):
        url = urllib.parse.urlsplit(target)
        if url.scheme:
            good = url.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]+", url.netloc) and " " not in target
        else:
            path = page.parent / url.path if url.path else page
            good = path.exists() and (not url.fragment or url.fragment in anchors(path.read_text()))
        lost += [] if good else [target]
    return lost


def exists(path, *parents):
    """Whether a path, with * and {one,other} as in a shell and {any} as in a docstring, leads somewhere."""
    parts = [part.split(",") if "," in part else ["*"] if i % 2 else [part] for i, part in enumerate(re.split("[{}]", path))]
    return all(any(glob.glob(str(parent / "".join(words))) for parent in parents) for words in itertools.product(*parts))


def lost_paths(page):
    """Paths in code that lead nowhere, from the page's folder or from the repository's."""
    words = [word for word in CODE.findall(FENCED.sub("", page.read_text())) if re.fullmatch(r"[\w.,{}*/~-]+", word)]
    paths = [word for word in words if ("/" in word or word.endswith(ENDS)) and not ELSEWHERE.fullmatch(word)]
    modules = [word for word in words if re.fullmatch(r"benchmark(\.\w+)+", word)]
    return ([path for path in paths if not exists(path, page.parent, ROOT)]
            + [module for module in modules if not module_path(module).exists()])


@every_page
def test_links_and_paths_lead_somewhere(page):
    assert lost_links(page) == []
    assert lost_paths(page) == []


def test_lost_links_and_paths_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three!\n# One two three\n[a](#one-two-three) [b](#one-two-three-1) [c](page.md#one-two-three) [d](#one)\n"
        "[e](other.md) [f](http://a.org) [g](https://a) [h](https://a.org/b#c)\n"
        "`page.md` `page.{any}` `pa*.md` `page.py` `benchmark/nothing` `trudi_*.py` `eval/success`\n"
        "`benchmark/{tasks,task}.py` `benchmark.launch` `benchmark.lunch`\n"
        "```bash\n[i](no.md)\n# Four\n```\n[j](#four)\n")
    assert lost_links(page) == ["#one", "other.md", "http://a.org", "https://a", "#four"]
    assert lost_paths(page) == ["page.py", "benchmark/nothing", "benchmark/{tasks,task}.py", "benchmark.lunch"]


# ------------------------------------------------------------------------------------------------------------ commands
def module_path(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def imported(tree):
    """The file of every module, or of what is taken from it, by the name that it has here."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: module_path(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: module_path(node.module) for alias in node.names}
    return found


@functools.cache
def fields_of(path, *names):
    """The flags of a file's first class of these names, those of its bases too; positional and suppressed ones are none."""
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    node = classes[next(name for name in names if name in classes)]
    found = set()
    for base in node.bases:
        start, _, attribute = ast.unparse(base).partition(".")
        found |= fields_of(path if start in classes else imported(tree)[start], attribute or start)
    for field in [field for field in node.body if isinstance(field, ast.AnnAssign)]:
        kind = ast.unparse(field.annotation)
        found = found - {field.target.id} if re.search("Suppress|Positional", kind) else found | {field.target.id}
    return found


@functools.cache
def flags_of(path):
    """Fields of Args or Options, or the arguments of main where there is neither."""
    tree = ast.parse(path.read_text())
    if {"Args", "Options"} & {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
        return fields_of(path, "Options", "Args")
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return {argument.arg for argument in main.args.args}


def knows(path, flag):
    field = flag.removeprefix("--").replace("-", "_")
    return bool({field, field.removeprefix("no_")} & flags_of(path))


def split(line):
    """The simple commands of a line of shell, as words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    return [list(words) for separator, words in itertools.groupby(lexer, lambda word: word[0] in "&;|") if not separator]


def commands(text):
    """Those of blocks of shell, and those of code in a paragraph that begin as a command does."""
    lines = [line for kind, block in FENCED.findall(text) if kind == "bash"
             for line in block.replace("\\\n", " ").splitlines()]
    spans = [span.replace("\n", " ") for span in CODE.findall(FENCED.sub("", text))]
    lines += [span for span in spans if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|uv|pip) ", span)]
    return [words for line in lines for words in split(line)]


def handed_on(words, flags):
    """Flags in --flags that the script does not know to which they go."""
    names = [after for word, after in itertools.pairwise(words) if word == "--script"]
    script = ROOT / f"{names[0] if names else 'trudi_mjx'}.py"
    return [word for word in flags.split() if word.startswith("--") and not knows(script, word.split("=")[0])]


def lost_words(before, word):
    """A word that is a file, a folder or a module of the repository, unless it is there; of outputs the name's start is."""
    if before == "-r":
        good = exists(word, ROOT)
    elif re.match(r"benchmark\.[\w.]+:", word):
        good = exists(word.partition(":")[0].replace(".", "/") + "*", ROOT)
    elif re.match(r"(benchmark|tests)/", word):
        good = exists(f"{word}*" if before == "--output" else word, ROOT)
    else:
        good = True
    return [] if good else [word]


def faults(words):
    """What is wrong with a command: no such file, module, or flag."""
    program, found = None, []
    for before, word in itertools.pairwise(["", *words]):
        flag, _, value = word.partition("=")
        if word.endswith(".py") or before == "-m" and word not in ("venv", "pytest"):
            program = ROOT / word if word.endswith(".py") else module_path(word)
            if not program.exists():
                return [*found, word]
        elif flag == "--flags":
            found += handed_on(words, value)
        elif flag.startswith("--") and program and not knows(program, flag):
            found.append(flag)
        else:
            found += lost_words(before, word)
    return found


@every_page
def test_commands_know_what_they_name(page):
    wrong = {shlex.join(words): faults(words) for words in commands(page.read_text())}
    assert {command: found for command, found in wrong.items() if found} == {}


@pytest.mark.parametrize(("command", "wrong"), [
    ("python trudi_mjx.py --num-envs 8 --no-track --capture-video", []),
    ("python trudi_mjx.py --num-env 8 --batch-size 8 # --not-read", ["--num-env", "--batch-size"]),
    ("uv run --with x trudi_maniskill.py --impl jax", ["--impl"]),
    ("PYTHONPATH=. torchrun --nproc-per-node 4 trudi_mjx2.py --seed 1", ["trudi_mjx2.py"]),
    ("python -m benchmark.speed.rollout_and_update --num-envs 8 --repeats=3 --track --x", ["--track", "--x"]),
    ("python -m benchmark.lunch --seeds 3", ["benchmark.lunch"]),
    ("python -m benchmark.without_vulkan trudi_maniskill.py --seed 1 --seeds 1", ["--seeds"]),
    ("python -m benchmark.launch --flags='--preset cpu --pres=cpu'", ["--pres=cpu"]),
    ("python -m benchmark.studies.all_tasks --script trudi_maniskill --flags='--reward-mode dense --impl jax'", ["--impl"]),
    ("python -m venv --clear x && pip install -r requirements.txt -r need.txt", ["need.txt"]),
    ("python -m benchmark.report benchmark/results/{curves,curve}", ["benchmark/results/{curves,curve}"]),
    ("python trudi_mjx.py --env-id benchmark.studies.two_goals:TwoGoals", []),
    ("python trudi_mjx.py --env-id benchmark.studies.three_goals:TwoGoals", ["benchmark.studies.three_goals:TwoGoals"]),
    ("python tests/helpers/mutations.py --only mjx --all", ["--all"]),
])
def test_faults_of_commands_are_found(command, wrong):
    found = [fault for words in commands(f"```bash\n{command}\n```\n") for fault in faults(words)]
    assert found == wrong


@every_page
def test_python_in_pages_is_python(page):
    for kind, block in FENCED.findall(page.read_text()):
        if kind == "python":
            ast.parse(block)
