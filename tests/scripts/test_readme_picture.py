"""The picture of the README: drawn from the runs of the study, and readable on any page."""

import readme_picture as picture
import study_page as page


def test_numbers_are_those_of_the_study():
    """Guards the picture against the table of the study's page."""
    found = picture.differences()
    of_page = {(arm, other): d for arm, other, d in page.pooled_differences()}
    assert found["LoRA-FISH (small)"] == of_page["LoRA-FISH (small)", picture.BASELINE]
    means = [difference.mean for difference in found.values()]
    assert means == sorted(means, reverse=True)


def test_it_brings_its_own_background():
    """Guards dark pages: the texts are dark, so the first shape is a white card."""
    svg = picture.PICTURE.read_text(encoding="utf-8")
    assert "fill: #ffffff" in svg[: svg.index("</g>")]
    for difference in picture.differences().values():
        assert f">{100 * difference.mean:+.1f}</text>" in svg
