"""Tables, as they are drawn in Markdown and in a terminal."""

from rich.console import Console

from fish_tuning.experiments.tables import Table, markdown_text

TABLE = Table.of(
    [("a|b", 1), ("[red]c", 2)], {"name": lambda row: row[0], "n": lambda r: str(r[1])}
)


def lines(**options):
    console = Console(width=40)
    with console.capture() as capture:
        console.print(TABLE.terminal(**options))
    return capture.get().splitlines()


def test_markdown():
    """Guards against cells that a bar splits, and numbers that are not aligned."""
    assert TABLE.markdown().splitlines() == [
        "| name | n |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| \\[red\\]c | 2 |",
    ]
    assert TABLE.markdown(escape=str, numbers=False).splitlines()[1:3] == [
        "| --- | --- |",
        "| a|b | 1 |",
    ]


def test_markdown_text():
    """Guards against markup and line breaks in names from files, and names that need no escape."""
    assert markdown_text("a\n_b_ <i>`#1`") == "a \\_b\\_ &lt;i&gt;\\`\\#1\\`"
    assert markdown_text("LoRA-FISH r=8 (eval_loss)") == "LoRA-FISH r=8 (eval_loss)"


def test_terminal():
    """Guards against names that the terminal takes for colors, and a total that looks like any
    row."""
    plain = lines()
    assert any("[red]c" in line for line in plain)
    framed = lines(total=True)
    assert framed[-3].startswith("├") and "[red]c" in framed[-2]


def test_terminal_puts_columns_that_do_not_fit_below():
    """Guards against cells cut in two, and columns that are lost."""
    headers = ("method", *(f"column number {i}" for i in range(9)))
    table = Table(
        headers, (("LoRA-FISH", *("+0.0086 [-0.0038, +0.0199]",) * 9), ("b", *"123456789"))
    )
    for total in (False, True):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table.terminal(total=total))
        text = capture.get()
        assert max(map(len, text.splitlines())) <= 80
        assert text.count("+0.0086 [-0.0038, +0.0199]") == 9
        assert text.count("LoRA-FISH") == 5
