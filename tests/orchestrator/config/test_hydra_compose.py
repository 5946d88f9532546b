"""A text on the command line reaches the configuration as it was typed; a word that is no override is explained."""

import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from orchestrator.config.hydra_compose import check_words, compose, quote_override, swept_keys
from orchestrator.config.schema import is_text, parse_config
from orchestrator.errors import ConfigError

CHARACTERS = st.characters(blacklist_categories=("C", "Zl", "Zp"), blacklist_characters="$")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12)


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(project=TEXTS, version=TEXTS)
@example(project="Rome, 2024", version="2024_05_01")
@example(project="[new] set {1}", version="null")
@example(project='say "cheese"\\', version="\\'")
@example(project="#1: 50% ü\\", version="choice(1,2)")
@example(project="~=,", version=" 1e3 ")
def test_texts_arrive_as_typed(project: str, version: str):
    assume(not any(text[0] in "'\"" and text[-1] == text[0] and len(text) > 1 for text in (project, version)))
    config = parse_config(compose([f"wandb.project={project}", f"data.version={version}"]))
    assert (config.wandb.project, config.data.version) == (project, version)


def test_text_of_an_expert_arrives_as_typed():
    assert quote_override("experts.0.init=/m/a,b") == '++experts.0.init="/m/a,b"'
    assert is_text(("compute", "islands", "a", "env", "PORT"), "1")
    assert not is_text(("data", "path"), "null") and not is_text(("seed",), "1")


def test_commas_of_a_sweep_divide_texts():
    assert quote_override("data.version=1,b", is_sweep=True) == 'data.version="1",b'
    assert swept_keys([quote_override("data.version=1,2", is_sweep=True)]) == {"data.version"}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("demo", "did you mean experiment=demo?"),
        ("runs/demo", "did you mean experiment=demo folder=runs/demo?"),
        ("faces.yaml", "--config faces.yaml"),
        ("=3", "key=value"),
        ("a[", "the experiments are"),
    ],
)
def test_word_that_is_no_override_is_explained(word, hint):
    with pytest.raises(ConfigError) as error:
        compose(["seed=1", word])
    assert hint in str(error.value)


def test_folder_in_place_of_an_override_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="data.path="):
        check_words([str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="ddm resume"):
        check_words([str(tmp_path)])
