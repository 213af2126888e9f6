"""What is reckoned from a training."""

from benchmarks.cartridges.training import figures_of


def test_figures_follow_from_the_losses() -> None:
    """Half of the way from nothing to the text is met exactly; tokens are compared too."""
    losses = {"nothing": 3.0, "beginning": 2.5, "cartridge": 2.0, "text": 1.0}
    record = {
        "num_tokens": 100,
        "num_document_tokens": 390,
        "questions": losses,
        "conversations": losses | {"cartridge": 1.0},
    }
    figures = {figure.figure.rpartition(".")[2]: figure for figure in figures_of(record, 90.0)}

    assert (figures["way"].value, figures["way"].met) == (0.5, True)
    assert figures["way_made_up"].value == 1.0
    assert (figures["fewer_tokens"].value, figures["fewer_tokens"].met) == (3.9, False)
    assert (figures["loss"].ratio, figures["time"].value) == (2.0, 1.5)
