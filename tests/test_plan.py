"""The plan: what it counts, what it estimates, and that it touches nothing. No engine, no Ray, no model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from psycho import memory, plan
from psycho.config import TrainingConfig, build_config, load_config
from psycho.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput
from psycho.job import Options, execute
from psycho.run import FORMAT, Run
from psycho.stages import STAGES, check_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER, SMALL = ROOT / "configs" / "paper-8b.yaml", ROOT / "configs" / "small-1gpu.yaml"


def stages(config, job="pipeline"):
    return {stage.name: stage for stage in plan.build_plan(config, job).stages}


def printed(config, job="pipeline", width=80):
    out = io.StringIO()
    plan.print_plan(config, job, Console(file=out, width=width))
    return out.getvalue()


def minimal(**settings):
    return build_config({"policy": "o/p-8B", "training": {"workers": 8}} | settings, "test")


# What a person sees


def test_dry_run_of_the_paper_prints_every_stage_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def recipe(job):
        raise AssertionError("a dry run must not run the recipe")

    assert execute("pipeline", recipe, Options(config=PAPER, dry_run=True)) == EXIT_DONE
    out = capsys.readouterr().out
    assert all(stage.name in out for stage in STAGES)
    assert "speeches: data/speeches.parquet (not there yet; assuming 26,483 as in the paper)" in out
    assert "80 GB: fits" in out and "1,720,544" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs_no_ray_and_no_heavy_import(tmp_path):
    program = f"""
import sys
from psycho.job import Options, execute
code = execute("pipeline", None, Options(config={str(PAPER)!r}, dry_run=True))
names = ("torch", "vllm", "transformers", "deepspeed", "ray")
heavy = [name for name in names if name in sys.modules]
started = False
print(code, heavy, started)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 [] False", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_whole_on_a_terminal_of_80_columns():
    text = printed(load_config(PAPER), "train_dpo")
    assert "…" not in text
    online = next(line for line in text.splitlines() if "train_online " in line)
    assert online.split() == ["train_online", "819,200", "819,200", "1,720,544", "1,600", "137.0", "16", "26.0", "14.9"]
    assert len(online) < 80


def test_the_stage_that_is_asked_for_is_marked():
    lines = printed(load_config(SMALL), "train_dpo").splitlines()
    assert [line.split()[1] for line in lines if line.startswith(">")] == ["train_dpo"]


def test_stages_that_are_done_are_said_to_be(tmp_path):
    config = load_config(PAPER, run_dir=str(tmp_path / "run"))
    run = Run(config, STAGES)
    (tmp_path / "run" / "manifests").mkdir(parents=True)
    (tmp_path / "run" / "speeches").mkdir()
    manifest = {"key": run.key("prepare"), "format": FORMAT}
    (tmp_path / "run" / "manifests" / "prepare.json").write_text(json.dumps(manifest))
    (tmp_path / "run" / "manifests" / "judge.json").write_text("{cut short")
    before = sorted(tmp_path.rglob("*"))
    assert "(is there; stages done: prepare)" in printed(config)
    assert sorted(tmp_path.rglob("*")) == before


# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_passes_the_check(path):
    config = load_config(path)
    check_config(config)
    assert all(stage.gpu_gib is not None for stage in plan.build_plan(config, "pipeline").stages)


def test_the_paper_is_the_paper():
    config = load_config(PAPER)
    assert len({model.model for model in config.generation.pool}) == 20
    sizes = [model.parameters_b for model in config.generation.pool]
    assert min(sizes) >= 3 and 70 <= max(sizes) < 75
    online = config.online
    assert online.rounds * online.speeches_per_round // online.batch_size == 1600
    assert config.judge.model not in {model.model for model in config.generation.pool}
    assert config.evaluation.judge.model != config.judge.model


def test_an_unknown_key_names_the_nearest_one(tmp_path, capsys):
    with pytest.raises(BadInput, match=r"unknown key training\.dpo\.betta; did you mean training\.dpo\.beta\?"):
        load_config(PAPER, ["training.dpo.betta=0.2"])
    options = Options(config=PAPER, overrides=("onlin.rounds=2",), dry_run=True)
    assert execute("pipeline", lambda job: None, options) == EXIT_BAD_INPUT
    assert "did you mean online?" in capsys.readouterr().err


# Rows


def test_rows_of_a_csv_with_line_breaks_in_its_cells(tmp_path):
    file = tmp_path / "speeches.csv"
    file.write_text('question\n"one\ntwo"\nthree\n\nfour\n', encoding="utf-8")
    config = minimal(speeches={"source": str(file)})
    assert plan.count_speeches(config) == (3, f"{file} (3 rows before cleaning)")


def test_rows_of_jsonl_and_parquet_and_a_limit(tmp_path):
    lines, table = tmp_path / "s.jsonl", tmp_path / "s.parquet"
    lines.write_text('{"question": "a"}\n\n{"question": "b"}\n', encoding="utf-8")
    pq.write_table(pa.table({"question": ["a"] * 100}), table)
    assert plan.count_speeches(minimal(speeches={"source": str(lines)}))[0] == 2
    count, told = plan.count_speeches(minimal(speeches={"source": str(table), "limit": 40}))
    assert (count, told) == (40, f"{table} (100 rows before cleaning; speeches.limit 40)")
    table.write_bytes(b"cut short")
    with pytest.raises(BadInput, match="is not a Parquet file or is cut short"):
        plan.count_speeches(minimal(speeches={"source": str(table)}))


PAIR = {"prompt": "Case", "chosen": "Warm", "rejected": "Cold"}


@pytest.mark.parametrize(
    ("setting", "name", "content", "said"),
    [
        ("speeches", "a.csv", "text,topic\nsecret,grief\n", "has no column question; its columns are text, topic"),
        ("speeches", "a.jsonl", '{"text": "secret"}\n', "has no column question; its columns are text"),
        ("speeches", "a.json", '[{"text": "secret"}]', "has no column question; its columns are text"),
        ("speeches", "a.csv", "question\nsecret, and more\n" * 3, "do not fit its header"),
        ("speeches", "a.csv", "question\n", "holds no rows"),
        ("speeches", "a.txt", "secret", "ends in '.txt'"),
        (
            "pairs",
            "a.jsonl",
            json.dumps({"prompt": "secret", "answer": "b"}),
            "no column chosen and 1 more; its columns",
        ),
        ("pairs", "a.jsonl", json.dumps(PAIR | {"rejected": ["secret"]}), "none that can be used"),
        ("pairs", "a.csv", "prompt,chosen,rejected\nsecret, a,b,c\n" * 2, "do not fit its header"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, capsys, setting, name, content, said):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    options = Options(overrides=(f"{setting}.source={file}",), run_dir=str(tmp_path / "run"), dry_run=True)
    assert execute("prepare", lambda job: None, options) == EXIT_BAD_INPUT
    found = capsys.readouterr().err
    assert said in found and "secret" not in found and len(found.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_pairs_of_any_shape(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([PAIR | {"prompt": f"Case {n}"} for n in range(7)]))
    assert plan.count_speeches(minimal(pairs={"source": str(file)}))[0] == 7


def test_rows_of_a_folder_and_of_what_is_far_away(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": ["a"] * 7}).save_to_disk(tmp_path / "saved")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("question\none\ntwo\n")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"question": "a"}\n')
    assert plan.count_speeches(minimal(speeches={"source": str(tmp_path / "saved")}))[0] == 7
    assert plan.count_speeches(minimal(speeches={"source": str(tmp_path / "mixed")}))[0] == 3
    for far in ("s3://bucket/speeches.csv", "owner/name"):
        assert "not counted from here; assuming 26,483" in plan.count_speeches(minimal(speeches={"source": far}))[1]


def test_rows_follow_the_paper():
    found = stages(load_config(PAPER))
    assert found["generate"].requests == found["judge"].rows_in == 26_483 * 4
    assert found["pair"].rows_out == pytest.approx(34_329 + 2_324, rel=0.005)
    assert found["train_reward"].steps == 2 * -(-found["train_reward"].rows_in // 128)
    assert found["train_online"].steps == 1600
    assert found["train_online"].rows_in == 16 * 6400 * 8


def test_a_held_out_judge_is_counted():
    """A rating of an answer to each dev speech, before the first round and after every fourth; its GPU too."""
    plain = stages(load_config(PAPER))["train_online"]
    watched = stages(load_config(PAPER, ["online.gold_every=4"]))["train_online"]
    assert watched.requests - plain.requests == pytest.approx(0.1 * 24_159 * (1 + 16 // 4), rel=0.001)
    judge = load_config(PAPER).evaluation.judge
    assert judge and len(watched.phases[0]) == len(plain.phases[0]) + 1


PAPER_3B = ROOT / "configs" / "paper-3b.yaml"


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["online.gold_every=1"], 5 + 2 + 1 + 4),  # training, samples, the reward model, one worker that watches
        (["online.gold_every=1", "online.scorer_workers=null"], 5 + 2 + 2 + 2 * 4),
        (["online.scorer=judge"], 5 + 2 + 4),
        (["online.scorer=mixture", "online.gold_every=1"], 5 + 2 + 1 + 4 + 4),
    ],
)
def test_gpus_of_online_training_are_those_that_it_starts(overrides, gpus):
    assert stages(load_config(PAPER_3B, overrides))["train_online"].gpus == gpus


@pytest.mark.parametrize(
    ("own", "engines"),
    [({}, 1), ({"gpus_per_worker": 0.5}, 2), ({"engine": {"max_model_len": 64}}, 2), ({"other": True}, 2)],
)
@pytest.mark.parametrize("watches", [False, True])
def test_a_judge_that_takes_turns_with_the_policy_is_no_engine_of_its_own(tmp_path, own, engines, watches):
    for name in ("policy-1B", "judge-1B"):
        (tmp_path / name).mkdir()
        other = {"vocab_size": 2} if own.get("other") and name == "judge-1B" else {}
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": 8} | other))
    judge = {"model": str(tmp_path / "judge-1B")} | {key: value for key, value in own.items() if key != "other"}
    asked = {"scorer": "reward", "gold_every": 1} if watches else {"scorer": "judge"}
    config = minimal(
        run_dir=str(tmp_path / "run"),
        policy=str(tmp_path / "policy-1B"),
        pairs={"dev_share": 0.1},
        online=asked,
        **({"evaluation": {"judge": judge}} if watches else {"judge": judge}),
    )
    online = stages(config)["train_online"]
    [phase] = online.phases
    assert len(phase) == engines + watches + 1  # the reward model scores where the judge watches; the trainer
    assert online.requests > 2 * online.rows_in  # every sample is scored, whoever has the engine


def test_dev_speeches_are_answered_and_scored_before_the_first_round_and_after_each():
    with_dev, without = (stages(load_config(PAPER, [f"pairs.dev_share={share}"])) for share in (0.1, 0))
    more = with_dev["train_online"].requests - 2 * 8 * 16 * 6400
    assert more == pytest.approx(2 * 17 * 0.1 * 24_159, rel=0.001)
    assert without["train_online"].requests == 2 * 8 * 16 * 6400


def test_rows_of_the_nano_world():
    found = stages(load_config(ROOT / "configs" / "nano.yaml"))
    assert found["prepare"].rows_out == 420 + 260
    assert found["evaluate"].rows_in == 4 * 260
    assert all(stage.gpus == 0 for stage in found.values())


def test_pairs_by_gap():
    assert plan.expected_pairs(1000, 4, 0.0) == 6000
    assert plan.expected_pairs(1000, 4, 1.0) == pytest.approx(6000 * 34_329 / (24_159 * 6), rel=0.01)
    assert plan.expected_pairs(1000, 4, 0.0, limit=2) == 2000
    assert plan.expected_pairs(1000, 4, 2.0) < plan.expected_pairs(1000, 4, 1.0) / 5


# Memory


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),  # GB, by hand: 8e9 parameters, 8 GPUs
    [(0, 16, 16, 96), (1, 16, 16, 12), (2, 16, 2, 12), (3, 2, 2, 12)],
)
def test_zero_by_hand(stage, weights, gradients, optimizer):
    found = [part * memory.GIB / 1e9 for part in memory.zero_gib(8, 8, stage)]
    assert found == pytest.approx([weights, gradients, optimizer])


def test_zero_of_the_paper_that_defines_it():
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs are 120, 31.4, 16.6 and 1.9 GB."""
    totals = [sum(memory.zero_gib(7.5, 64, stage)) * memory.GIB / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_single_precision_is_sixteen_bytes_too():
    assert sum(memory.zero_gib(1, 1, 0, "fp32")) == pytest.approx(sum(memory.zero_gib(1, 1, 0)))


def test_offloading_moves_the_optimizer_to_the_host():
    def load(offload):
        config = minimal(training={"workers": 8, "zero_stage": 2, "offload_optimizer": offload})
        return memory.training_load(config, "o/p-8B")

    kept, moved = load(False), load(True)
    assert kept.gib - moved.gib == pytest.approx(12e9 / memory.GIB)
    assert moved.host_gib - kept.host_gib == pytest.approx(12e9 / memory.GIB)


@pytest.mark.parametrize(("loss", "copies"), [("dpo", 1), ("simpo", 0)])
def test_a_fixed_reference_is_a_whole_copy_on_every_rank(loss, copies):
    """8e9 weights in 16 bits, however many workers share the rest; a loss without a reference keeps none."""

    def gib(reference):
        online = {"reference": reference, "loss": loss}
        config = minimal(training={"workers": 8, "zero_stage": 3}, online=online)
        return stages(config)["train_online"].phases[0][-1].gib

    assert gib("fixed") - gib("each_round") == pytest.approx(copies * 16e9 / memory.GIB)


def test_checkpointing_saves_activations_and_logits_do_not_grow_with_the_bin():
    plain, saving = TrainingConfig(), TrainingConfig(gradient_checkpointing=True)
    assert memory.activation_gib(8, saving) < memory.activation_gib(8, plain) / 10
    twice = saving.model_copy(update={"bin_tokens": 2 * saving.bin_tokens})
    logits = 2 * memory.activation_gib(8, saving) - memory.activation_gib(8, twice)
    assert logits == pytest.approx(0.375)


@pytest.mark.parametrize(("size", "hidden", "layers"), [(0.49, 896 * 2, 12), (8.03, 4096, 32), (70.6, 8192, 80)])
def test_shape_is_near_that_of_known_models(size, hidden, layers):
    """Qwen2.5-0.5B is half as wide and twice as deep, which leaves width x depth (activations) as it is."""
    found_hidden, found_layers = memory.shape(size)
    assert found_hidden * found_layers == pytest.approx(hidden * layers, rel=0.2)


def test_engine_by_hand():
    """Llama-3.1-8B in bf16 at 8,192 tokens: 16 GB of weights, 131,072 bytes of cache a token."""
    config = minimal(inference={"engine": {"max_model_len": 8192}})
    expected = (16.06e9 + 131_072 * 8192) / memory.GIB + 2
    assert memory.engine_gib(8.03, config.inference.engine) == pytest.approx(expected, rel=0.02)


def test_small_fits_one_card_of_24_gb_with_training_and_engine_together():
    config = load_config(SMALL)
    for stage in plan.build_plan(config, "pipeline").stages:
        assert stage.gpus <= 1
        assert all(memory.fits(phase, 24) for phase in stage.phases), stage.name
    crowded = load_config(SMALL, ["inference.engine.gpu_memory_utilization=0.9"])
    assert not all(memory.fits(phase, 24) for phase in stages(crowded)["train_online"].phases)


def test_paper_fits_80_gb_and_16_gpus():
    found = plan.build_plan(load_config(PAPER), "pipeline")
    assert max(stage.gpus for stage in found.stages) == 16
    assert all(memory.fits(phase, 80) for stage in found.stages for phase in stage.phases)
    assert not all(memory.fits(phase, 48) for stage in found.stages for phase in stage.phases)


# Sizes and warnings


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen2.5-0.5B-Instruct", 0.5),
        ("SmolLM2-1.7B-Instruct", 1.7),
        ("SmolLM2-360M-Instruct", 0.36),
        ("gemma-2-9b-it", 9),
        ("Mixtral-8x7B-Instruct-v0.1", 56),
        ("Phi-3.5-mini-instruct", None),
    ],
)
def test_size_by_name(name, size):
    assert memory.size_of_name(name) == pytest.approx(size)


def test_size_as_configured_then_by_name_then_by_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4000)
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    sizes = {1: 1.24, 2: None, 3: 3, 4: 4}
    pool = [{"name": f"m{i}", "model": f"o/m-{i}B", "parameters_b": size} for i, size in sizes.items()]
    again = {"name": "again", "model": "o/m-1B"}  # with other sampling, say, and its size not said twice
    config = minimal(generation={"pool": [*pool, again]})
    assert memory.parameters_b(config, "o/m-1B") == 1.24
    assert memory.parameters_b(config, "o/m-2B") == 2
    assert memory.parameters_b(config, str(tmp_path)) == pytest.approx(1e-6)
    assert memory.parameters_b(config, "o/nameless") is None


def test_an_unknown_size_is_shown_as_such():
    text = printed(load_config(PAPER, ["policy=o/nameless", "policy_parameters_b=null"]))
    assert "policy: o/nameless (size unknown)" in text
    assert "unknown" in next(line for line in text.splitlines() if "train_dpo" in line)
    assert "size unknown of o/nameless" in text


def test_warnings():
    def warnings(*overrides):
        return " | ".join(plan.build_plan(load_config(PAPER, overrides), "pipeline").warnings)

    assert warnings().count("|") == 0 and "not there yet" in warnings()
    assert "labels the pairs and judges" in warnings("evaluation.judge=null")
    assert "train_dpo needs" in warnings("training.zero_stage=0")
    assert "the run would stop at once: tensor_parallel_size 4" in warnings("judge.gpus_per_worker=1")
    assert "tensor_parallel_size is 4 but judge.gpus_per_worker is 0; give it 4" in warnings("judge.gpus_per_worker=0")
    assert "the run would stop at once: evaluation.baseline is empty" in warnings("evaluation.baseline=''")


def test_nano_models_are_not_for_the_speeches_of_people():
    def said(*overrides):
        warnings = plan.build_plan(load_config(ROOT / "configs" / "nano.yaml", overrides), "pipeline").warnings
        return [text for text in warnings if "nano world" in text]

    assert said() == []
    for source in ("speeches.source=mine.csv", "pairs.source=pairs.parquet"):
        [sentence] = said(source)
        assert sentence.startswith("policy, judge.model, evaluation.baseline, generation.pool")
        assert "mean nothing for real people; start from configs/smollm2.yaml" in sentence
    real = load_config(SMALL, ["speeches.source=mine.csv"])
    assert not any("nano world" in text for text in plan.build_plan(real, "pipeline").warnings)


def test_a_remote_model_needs_nothing_here_and_has_its_price(tmp_path):
    far = {"name": "far", "model": "large", "price": {"input": 2.5, "output": 10}, "remote": {"url": "https://far/v1"}}
    generation = {"models_per_speech": 1, "pool": [far], "budget": 3}
    tree = {"run_dir": str(tmp_path), "generation": generation}
    config = build_config(tree, "test")
    built = plan.build_plan(config, "generate")
    [stage] = [stage for stage in built.stages if stage.name == "generate"]
    assert (stage.gpus, stage.gpu_gib, stage.host_gib) == (0, 0, 0)
    speeches = config.speeches.nano_train + config.speeches.evaluation
    prompt = (config.speeches.min_chars + config.speeches.max_chars) // 2 // 4 + 20
    assert plan.remote_cost(config, speeches) == pytest.approx(speeches * (prompt * 2.5 + 512 * 10) / 1e6)
    assert any("remote models of the pool will cost about" in w and "budget is 3" in w for w in built.warnings)
    assert not any("size unknown of far" in w or "far, remote" in w for w in built.warnings)


def test_until_a_stage_is_the_plan_of_those_before_it():
    out = io.StringIO()
    plan.print_plan(
        load_config(PAPER), "pipeline", Console(file=out, width=80), ("prepare", "generate", "judge", "pair")
    )
    assert "judge" in out.getvalue() and "train_sft" not in out.getvalue()
