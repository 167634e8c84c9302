"""The section of a page that a command writes."""


def with_section(page: str, text: str, begin: str, end: str) -> str:
    """Return the page with `text` between the marks `begin` and `end`.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks {begin.strip()} or {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
