"""The config: what it refuses and in which words, what it keeps, and that every setting is read by some code."""

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from jaxrl import config as config_module
from jaxrl.config import CHOICES, MAY_CHANGE, Config, check_sources, describe, differences, from_dict, load, save
from jaxrl.config.verl_names import VERL_NAMES

ROOT = Path(__file__).parent.parent
SMALLEST = {
    "model": {"path": "some/model"},
    "data": {"train_files": "task:arithmetic", "train_batch_size": 8},
    "reward": {"functions": [{"name": "exact_number"}]},
    "actor": {"ppo_mini_batch_size": 4},
    "trainer": {"experiment_name": "test"},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def test_a_file_and_its_overrides_make_a_config(file):
    c = load(
        file,
        ["actor.optim.lr=1e-4", "rollout.val_kwargs.top_k=3", "data.train_kwargs.size=20", "trainer.logger=[jsonl]"],
    )
    assert (c.actor.optim.lr, c.rollout.val_kwargs.top_k, c.data.train_kwargs) == (1e-4, 3, {"size": 20})
    assert list(c.trainer.logger) == ["jsonl"]
    assert c.model.path == "some/model" and c.critic.optim.lr == 1e-5 and c.reward.functions[0].weight == 1.0


def test_the_last_of_two_overrides_holds(file):
    assert load(file, ["rollout.n=2", "rollout.n=3"]).rollout.n == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modl.path=x", r"modl is not a key of the config\. Did you mean model\?"),
        ("model.pth=x", r"model\.pth is not a key of the config\. Did you mean model\.path\?"),
        ("actor.optim.lrr=1", r"actor\.optim\.lrr is not .* Did you mean actor\.optim\.lr\?"),
        ("rollout.val_kwargs.tmperature=1", r"Did you mean rollout\.val_kwargs\.temperature\?"),
        (
            "reward.functions=[{name: a},{nme: b}]",
            r"reward\.functions\[1\]\.nme is .* mean reward\.functions\[1\]\.name\?",
        ),
        ("mesh.zzz=1", r"mesh\.zzz is not a key of the config\. Known: data, fsdp, tensor"),
    ],
)
def test_an_unknown_key_at_any_depth_is_answered_with_a_suggestion(override, sentence, file):
    with pytest.raises(ValueError, match=sentence):
        load(file, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("actor.optim.lr=fast", "actor.optim.lr is 'fast' and must be float"),
        ("actor.optim.lr=", "actor.optim.lr is None and must be float"),
        ("actor.optim.lr=1=2", "actor.optim.lr is '1=2' and must be float"),
        ("rollout.n=1.5", "rollout.n is 1.5 and must be int"),
        ("data.shuffle=maybe", "data.shuffle is 'maybe' and must be bool"),
        ("data.train_kwargs=3", "data.train_kwargs is 3 and must be keys and values, as {a: 1}"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas is [0.9] and must be two numbers, as [0.9, 0.999]"),
        ("trainer.logger=console", "trainer.logger is 'console' and must be a list of texts, as [a, b]"),
        (
            "reward.functions=exact_number",
            "reward.functions is 'exact_number' and must be a list, as [{name: exact_number}]",
        ),
        ("reward.functions=[exact_number]", "reward.functions[0] must be a section with keys, and is 'exact_number'"),
        ("reward.functions=[{name: a, weight: b}]", "reward.functions[0].weight is 'b' and must be float"),
        ("actor.optim=adam", "actor.optim must be a section with keys, and is 'adam'"),
        ("model.path=${nowhere}", "model.path: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(override, sentence, file):
    with pytest.raises(ValueError) as caught:
        load(file, [override])
    assert str(caught.value) == f"{file}: {sentence}"


def test_a_setting_may_refer_to_another(file):
    assert load(file, ["rollout.top_k=4", "rollout.val_kwargs.top_k=${rollout.top_k}"]).rollout.val_kwargs.top_k == 4


@pytest.mark.parametrize("override", ["actor.optim", "=5", "a..b=1", ".a=1", ""])
def test_an_override_without_key_and_value_is_refused_with_an_example(override, file):
    with pytest.raises(ValueError, match="is not of the form a.b=c, for example actor.optim.lr=1e-6"):
        load(file, [override])


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("actor.clip_ratio=0.3", "Here it is actor.clip_ratio_low and actor.clip_ratio_high"),
        ("actor.ppo_micro_batch_size_per_gpu=4", "rows are always packed"),
        ("data.val_batch_size=8", "rollout.max_num_seqs at a time"),
        ("actor_rollout_ref.model.path=x", "its parts at the top: model, actor, rollout and ref"),
        ("trainer.n_gpus_per_node=8", "mesh.data, mesh.fsdp and mesh.tensor"),
    ],
)
def test_a_setting_of_verls_is_answered_with_what_it_is_here(file, override, answer):
    with pytest.raises(ValueError, match=f"is a name of verl's. .*{re.escape(answer)}"):
        load(file, [override])


def test_the_answers_to_verls_names_name_settings_that_exist():
    known = {f.name for f in dataclasses.fields(Config)}
    for name, answer in VERL_NAMES.items():
        assert not _exists(name), f"{name} is a setting here too"
        for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", answer):
            if word.split(".")[0] in known:
                assert _exists(word), f"{name}: {word}"


def _exists(key: str) -> bool:
    cls: typing.Any = Config
    for name in key.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if name not in hints:
            return False
        cls = hints[name]
    return True


def test_a_band_is_a_band_however_it_is_written(file):
    key = "algorithm.rollout_correction.rollout_is_threshold"
    quoted, bare = (load(file, [f"{key}={band}"]) for band in ('"0.5_2"', "0.5_2"))
    assert bare.algorithm.rollout_correction.rollout_is_threshold == "0.5_2"
    assert quoted == bare
    section = {"rollout_correction": {"rollout_is": "token", "rollout_is_threshold": "BAND"}}
    file.write_text(yaml.safe_dump(SMALLEST | {"algorithm": section}).replace("BAND", "1_4"))
    assert load(file).algorithm.rollout_correction.rollout_is_threshold == "1_4"


def test_the_critic_learns_as_often_and_weighted_as_the_actor_unless_it_is_told(file):
    c = load(file, ["actor.ppo_epochs=4", "actor.loss_agg_mode=seq-mean-token-mean"])
    assert (c.critic_ppo_epochs, c.critic_loss_agg_mode) == (4, "seq-mean-token-mean")
    c = load(file, ["actor.ppo_epochs=4", "critic.ppo_epochs=2", "critic.loss_agg_mode=token-sum"])
    assert (c.critic_ppo_epochs, c.critic_loss_agg_mode) == (2, "token-sum")


def test_an_override_that_is_no_yaml_is_refused(file):
    with pytest.raises(ValueError, match=r"override 'actor.optim.betas=\[' has no value that YAML can read"):
        load(file, ["actor.optim.betas=["])


def test_an_override_of_one_item_of_a_list_is_refused_with_an_example(file):
    with pytest.raises(ValueError, match="a list is set as a whole, for example reward.functions="):
        load(file, ["reward.functions[0].weight=2"])


def test_settings_that_are_missing_are_all_named(file):
    with pytest.raises(ValueError, match=r"^trainer\.experiment_name must be set$"):
        from_dict({})
    with pytest.raises(ValueError, match=r"^data\.train_files, model\.path must be set$"):
        check_sources(from_dict({"trainer": {"experiment_name": "x"}}))
    with pytest.raises(ValueError, match=r"reward\.functions\[0\]\.name must be set"):
        load(file, ["reward.functions=[{weight: 2}]"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "holds a list, and a config is sections"),
        ("model: [", "is not a YAML file of sections"),
        ("3", "is not a YAML file of sections"),
        ("model:", "model must be a section with keys, and is None"),
        ("# caf\xe9\nmodel: {}", "is not a YAML file of sections: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(text, sentence, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path)
    assert "broken.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml is not there"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder: --config takes a YAML file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["actor.ppo_mini_batch_size=3"], "ppo_mini_batch_size 3 must divide data.train_batch_size 8"),
        (["trainer.row_length=1000"], r"row_length 1000 is shorter than .* = 1024"),
        (["reward.functions=[]"], "there is no reward: set reward.functions"),
        (["model.attention=splash", "rollout.n=2"], "splash cannot share a prompt .* set trainer.share_prompt=false"),
        (
            ["model.attention=splash", "trainer.row_length=1100"],
            "blocks of 128 tokens, and trainer.row_length 1100 is no",
        ),
        (["algorithm.rollout_correction.rollout_rs=token_k1"], "rollout_rs and rollout_rs_threshold belong together"),
        (
            ["algorithm.rollout_correction.rollout_rs_threshold=2"],
            "rollout_rs and rollout_rs_threshold belong together",
        ),
        (["rollout.val_kwargs.n=2"], "val_kwargs.n above 1 needs rollout.val_kwargs.temperature above 0"),
        (
            ["rollout.val_kwargs.greedy=true", "rollout.val_kwargs.temperature=1"],
            "val_kwargs.greedy is a greedy answer .* beside n samples .* set rollout.val_kwargs.n above 1",
        ),
        (
            ["algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.rollout_is=token"],
            "bypass_mode leaves nothing to correct",
        ),
        (["model.lora_rank=4", "model.lora_targets=[q_proj,wv]"], "model.lora_targets .*wv.* must be some of q_proj"),
        (["model.lora_rank=4", "model.lora_targets=[]"], "model.lora_targets .* must be some of q_proj"),
        (["trainer.logger=[jsonl,console,jsonl]"], "trainer.logger .* names one twice"),
        (["trainer.resume_mode=resume_path"], "resume_path needs trainer.resume_from_path"),
        (
            ["trainer.resume_from_path=a/global_step_1"],
            "resume_from_path is of trainer.resume_mode resume_path: set it",
        ),
        (["model.lora_rank=4", "model.lora_alpha=0"], "model.lora_alpha 0.0 must be above 0"),
        (["actor.optim.clip_grad=-1"], "actor.optim.clip_grad is -1.0 and must be above 0"),
        (["critic.optim.lr=.nan"], "critic.optim.lr is nan and must be 0 or above"),
        (["actor.optim.betas=[1.5,2]"], "actor.optim.betas is 1.5 and must be from 0 to below 1"),
        (["algorithm.gamma=5"], "algorithm.gamma is 5.0 and must be from 0 to 1"),
        (["actor.entropy_coeff=.inf"], "actor.entropy_coeff is inf and must be a finite number"),
        (["actor.loss_scale_factor=0"], "actor.loss_scale_factor is 0 and must be above 0"),
        (
            ["actor.ppo_max_token_len_per_gpu=1000"],
            "ppo_max_token_len_per_gpu 1000 is less than a packed row, of 1024 tokens: raise it, or lower trainer.row_length",
        ),
        (["model.lora_rank=-1"], "model.lora_rank -1 must be 0, which trains all weights, or above"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_fix(overrides, sentence, file):
    with pytest.raises(ValueError, match=sentence):
        load(file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.attention=splash", "rollout.n=2", "trainer.share_prompt=false"],
        ["model.attention=splash", "rollout.n=1"],
        ["reward.functions=[]", "reward.model.path=some/reward"],
        [
            "algorithm.rollout_correction.rollout_rs=token_k1",
            "algorithm.rollout_correction.rollout_rs_threshold=0.5_2.0",
        ],
        ["trainer.row_length=1024"],
        ["trainer.resume_mode=resume_path", "trainer.resume_from_path=runs/a/checkpoints/global_step_3"],
    ],
)
def test_what_does_fit_together_passes(overrides, file):
    load(file, overrides)


@pytest.mark.parametrize(
    "key",
    [
        "data.max_prompt_length", "data.max_response_length", "data.train_batch_size", "rollout.n",
        "rollout.max_num_seqs", "rollout.val_kwargs.n", "rollout.temperature", "actor.ppo_epochs",
        "actor.ppo_mini_batch_size", "actor.ppo_max_token_len_per_gpu", "critic.ppo_epochs",
        "critic.ppo_max_token_len_per_gpu", "algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl",
        "reward.timeout_s", "trainer.max_ckpt_to_keep", "trainer.total_epochs", "trainer.total_training_steps",
        "trainer.row_length",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_count_that_is_not_above_zero_is_named(key, value, file):
    with pytest.raises(ValueError, match=rf"{key} is {value}(\.0)? and must be above 0"):
        load(file, [f"{key}={value}"])


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_is_not_one_is_answered_with_the_choices(key, file):
    with pytest.raises(ValueError, match=f"{key} is 'nonsense' and must be one of .*{CHOICES[key][-1]}"):
        load(file, [f"{key}=nonsense"])


def test_the_choices_are_those_of_the_code():
    from jaxrl.algorithms.correction import IMPORTANCE_LEVELS
    from jaxrl.data import Truncation
    from jaxrl.models.attention import ATTENTION
    from jaxrl.models.decoder import REMAT_POLICIES
    from jaxrl.optimizer import MOMENTS_DTYPES, SCHEDULES

    assert set(CHOICES["model.remat"]) == {"none", *REMAT_POLICIES}
    assert set(CHOICES["model.attention"]) == set(ATTENTION)
    assert set(CHOICES["algorithm.rollout_correction.rollout_is"]) == {None, *IMPORTANCE_LEVELS}
    for role in ("actor", "critic"):
        assert set(CHOICES[f"{role}.optim.lr_scheduler_type"]) == set(SCHEDULES)
        assert set(CHOICES[f"{role}.optim.moments_dtype"]) == set(MOMENTS_DTYPES)
    assert set(CHOICES["data.truncation"]) == set(typing.get_args(Truncation))


def test_the_defaults_of_named_functions_are_in_their_tables(file):
    from jaxrl.algorithms.advantages import ADVANTAGES
    from jaxrl.algorithms.aggregation import AGGREGATIONS
    from jaxrl.algorithms.kl import KL_CONTROLLERS, KL_ESTIMATORS
    from jaxrl.algorithms.losses import POLICY_LOSSES
    from jaxrl.loggers import LOGGERS

    c = load(file)
    assert c.algorithm.adv_estimator in ADVANTAGES and c.algorithm.kl_ctrl.type in KL_CONTROLLERS
    assert {c.algorithm.kl_penalty, c.actor.kl_loss_type} <= set(KL_ESTIMATORS)
    assert {c.actor.loss_agg_mode, c.critic_loss_agg_mode} <= set(AGGREGATIONS)
    assert c.actor.policy_loss.loss_mode in POLICY_LOSSES and set(c.trainer.logger) <= set(LOGGERS)


def test_describe_does_the_arithmetic_of_a_run(file):
    c = load(file, [
        "rollout.n=4", "actor.ppo_epochs=3", "trainer.critic_warmup=2", "data.max_prompt_length=100",
        "data.max_response_length=60",
    ])  # fmt: skip
    assert describe(c, num_rows=5, steps=10, num_prompts=80) == (
        "10 steps over 80 prompts. A step samples 4 responses to each of 8 prompts: 32 sequences. They are trained on "
        "in 2 mini-batches of 16 sequences, 3 times over: 6 updates a step, 54 in all. A micro-batch is at most 5 packed "
        "rows of 256 tokens. The learning rate moves once a step: 10 learning-rate steps."
    )


def test_what_follows_from_the_settings(file):
    assert not load(file).needs_ref
    assert (
        load(file, ["actor.use_kl_loss=true"]).needs_ref and load(file, ["algorithm.use_kl_in_reward=true"]).needs_ref
    )
    assert str(load(file).run_dir) == "runs/test" and str(load(file, ["trainer.run_dir=a/b"]).run_dir) == "a/b"
    # A shell leaves the ~ behind `trainer.run_dir=` to us.
    assert load(file, ["trainer.run_dir=~/a"]).run_dir == Path.home() / "a"


def test_a_saved_config_is_loaded_as_it_was(file, tmp_path):
    c = load(file, [
        "actor.optim.betas=[0.8,0.99]", "data.train_kwargs={size: 3, nested: {deep: [1, 2]}}", "data.val_files=[a, b]",
        "algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.rollout_is_threshold=0.5_2.0",
        "reward.functions=[{name: gsm8k, weight: 0.5, kwargs: {method: flexible}}]", "data.chat=true",
    ])  # fmt: skip
    save(c, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == c
    assert differences(c, tmp_path / "saved.yaml") == []


@pytest.mark.parametrize("text", ["", "model: {path", "[]"])
def test_a_folder_whose_config_cannot_be_read_is_refused_with_the_fix(file, tmp_path, text):
    (tmp_path / "saved.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"saved.yaml is not what a run has written, .*: remove the file if this is"):
        differences(load(file), tmp_path / "saved.yaml")


def test_differences_name_what_changes_the_run_and_let_pass_what_does_not(file, tmp_path):
    saved = tmp_path / "saved.yaml"
    save(load(file), saved)
    changed = load(
        file, ["actor.optim.lr=3e-5", "actor.optim.betas=[0.9,0.95]", "trainer.total_epochs=2", "mesh.tensor=2"]
    )
    assert differences(changed, saved) == [
        "actor.optim.betas was [0.9, 0.999] and is [0.9, 0.95]",
        "actor.optim.lr was 1e-06 and is 3e-05",
    ]
    reward = load(file, ["reward.functions=[{name: gsm8k}]", "data.train_kwargs.size=3"])
    assert [line.split()[0] for line in differences(reward, saved)] == [
        "data.train_kwargs", "data.train_kwargs.size", "reward.functions",
    ]  # fmt: skip


def test_a_run_from_before_a_setting_was_there_goes_on(file, tmp_path):
    c, saved = load(file), tmp_path / "saved.yaml"
    save(c, saved)
    tree = yaml.safe_load(saved.read_text())
    del tree["actor"]["param_dtype"], tree["trainer"]["stall_timeout_s"], tree["algorithm"]["filter_groups"]
    tree["critic"] |= {"ppo_epochs": 1, "loss_agg_mode": "token-mean"}  # what None stands for
    saved.write_text(yaml.safe_dump(tree))
    assert differences(c, saved) == []
    assert differences(load(file, ["rollout.val_kwargs={n: 8, temperature: 1.0, greedy: true}"]), saved) == []
    assert differences(load(file, ["actor.param_dtype=bfloat16"]), saved) == [
        "actor.param_dtype was 'float32' and is 'bfloat16'"
    ]


def test_what_may_change_exists():
    for key in [*MAY_CHANGE, *CHOICES]:
        assert _exists(key), key


def test_config_starts_no_jax():
    code = "import jaxrl.config, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_loads(path):
    load(path)


# Every field is read by some code: `c.actor.optim` is followed through names, parameters and attributes.

SECTIONS = {name: cls for name, cls in vars(config_module).items() if dataclasses.is_dataclass(cls)}
FOLDERS = ("jaxrl", "jaxrl/config", "jaxrl/rollout", "scripts")  # the floors that may see a config
READERS = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
ONLY_CHECKS = {"check", "_check_positive", "_check_sampling", "_check_vllm", "describe"}


class Reads(ast.NodeVisitor):
    """Which fields of which section the code reads. It is run until nothing new is learned."""

    def __init__(self):
        self.fields: set[tuple[str, str]] = set()
        self.known: dict[tuple[str, str], set[str]] = {}  # (where, expression) -> the sections that it may be
        self.where, self.owner = "", ""

    def sections_of(self, node: ast.AST) -> set[str]:
        text = ast.unparse(node)
        scope = self.owner if text.startswith("self.") else self.where
        found = set(self.known.get((scope, text), ()))
        if isinstance(node, ast.Attribute):
            for section in self.sections_of(node.value):
                hint = typing.get_type_hints(SECTIONS[section]).get(node.attr)
                if hint is not None:
                    self.fields.add((section, node.attr))
                found |= {x.__name__ for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)}
        return found

    def learn(self, scope: str, name: str, sections: set[str]) -> None:
        if sections:
            self.known.setdefault((scope, name), set()).update(sections)

    def assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for t, v in zip(target.elts, value.elts, strict=False):
                self.assign(t, v)
        elif isinstance(target, ast.Name | ast.Attribute):
            text = ast.unparse(target)
            self.learn(self.owner if text.startswith("self.") else self.where, text, self.sections_of(value))

    def visit_ClassDef(self, node):
        outside, self.owner = self.owner, node.name
        self.generic_visit(node)
        self.owner = outside

    def visit_FunctionDef(self, node):
        if node.name in ONLY_CHECKS:
            return
        outside, self.where = self.where, node.name
        for parameter in [*node.args.args, *node.args.kwonlyargs]:
            annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
            self.learn(self.where, parameter.arg, set(annotation.split(" | ")) & SECTIONS.keys())
            if parameter.arg == "self":
                self.learn(self.where, "self", {self.owner} & SECTIONS.keys())
        self.parameters[node.name] = [p.arg for p in node.args.args if p.arg != "self"]
        self.generic_visit(node)
        self.where = outside

    def visit_Assign(self, node):
        for target in node.targets:
            self.assign(target, node.value)
        self.generic_visit(node)

    def visit_comprehension(self, node):
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_Call(self, node):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        for name, argument in zip(self.parameters.get(function, []), node.args, strict=False):
            self.learn(function, name, self.sections_of(argument))
        self.generic_visit(node)

    def visit_Attribute(self, node):
        self.sections_of(node)
        self.generic_visit(node)

    def read(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        before = None
        self.known, self.parameters = {}, {}
        while before != self.known:
            before = {key: set(value) for key, value in self.known.items()}
            self.visit(tree)


def test_every_field_of_the_config_is_read_by_some_code():
    reads = Reads()
    for path in READERS:
        if "Config" in (text := path.read_text(encoding="utf-8")) or re.search(r"from \.+config import", text):
            reads.read(path)
    single = {key for key, choices in CHOICES.items() if len(choices) == 1}  # there is nothing to choose yet
    unread = [
        f"{name}.{field.name}"
        for name, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
        if (name, field.name) not in reads.fields
        and f"{name.removesuffix('Section').lower()}.{field.name}" not in single
    ]
    assert not unread, f"no code reads {unread}"
