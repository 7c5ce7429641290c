"""The table of the stack: what each process is told, and what comes of options."""

import os
import stat

import pytest

from stillhouse.embedded.process import StackError
from stillhouse.embedded.seaweedfs import Store
from stillhouse.embedded.stack import SERVICE_PROCESSES, Stack, StackOptions, read_stack

STORE = Store("http://127.0.0.1:9", "bucket", "key", "secret")


@pytest.fixture
def stack(tmp_path):
    def make(**options):
        one = Stack(tmp_path / "s", StackOptions(**options))
        one._make_folders()
        one._ports = one._choose_ports()
        one._broker_url = one.options.broker_url or "redis+socket:///x/vk.sock"
        one._store = one.options.store or one._own_store()
        return one

    return make


def table(stack, tmp_path):
    return {spec.name: spec for spec in stack.table(tmp_path)}


def test_the_table_names_every_part_and_service(stack, tmp_path):
    names = set(table(stack(teacher=True), tmp_path))
    assert names == {"valkey", "seaweedfs", "teacher", *SERVICE_PROCESSES}


def test_parts_given_by_url_are_not_started(stack, tmp_path):
    one = stack(broker_url="amqp://u:p@h//", store=STORE, database_url="postgresql://h/db")
    rows = table(one, tmp_path)
    assert set(rows) == set(SERVICE_PROCESSES)
    env = rows["teacher_gateway.api"].env
    assert env["TEACHER_GATEWAY_BROKER_URL"] == "amqp://u:p@h//"
    assert env["TEACHER_GATEWAY_STORE_BUCKET"] == "bucket"
    assert env["TEACHER_GATEWAY_DATABASE_URL"] == "postgresql://h/db"


def test_only_the_gateway_knows_the_database_and_the_pepper(stack, tmp_path):
    for name, spec in table(stack(), tmp_path).items():
        told = {key for key in spec.env if key.endswith(("_DATABASE_URL", "_KEY_PEPPER"))}
        assert bool(told) == name.startswith("teacher_gateway.")


def test_every_process_has_its_own_metrics_port_and_celery_workers_a_folder(stack, tmp_path):
    rows = table(stack(), tmp_path)
    ports = [
        rows[name].env[f"{name.partition('.')[0].upper()}_METRICS_PORT"]
        for name in SERVICE_PROCESSES
    ]
    assert len(set(ports)) == len(SERVICE_PROCESSES)
    with_folder = {name for name, row in rows.items() if "PROMETHEUS_MULTIPROC_DIR" in row.env}
    assert with_folder == {"teacher_gateway.worker", "dataset_builder.worker", "evaluator.worker"}
    assert all(rows[name].fresh_folders for name in with_folder)


def test_consumers_start_before_publishers_and_services_stop_before_parts(stack, tmp_path):
    rows = table(stack(), tmp_path)
    starts = {name: row.start_order for name, row in rows.items()}
    assert starts["valkey"] < starts["trainer.worker"] < starts["teacher_gateway.clock"]
    stops = {name: row.stop_order for name, row in rows.items()}
    assert stops["teacher_gateway.api"] < stops["seaweedfs"] < stops["valkey"]


def test_a_service_gets_its_own_variables_and_no_others(stack, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_DEVICE", "cuda")
    monkeypatch.setenv("TRAINER_BROKER_URL", "amqp://production//")
    monkeypatch.setenv("TEACHER_KEY_QWEN", "hush")
    rows = table(stack(pass_env=("TEACHER_KEY_QWEN",)), tmp_path)
    assert rows["trainer.worker"].env["TRAINER_DEVICE"] == "cuda"
    assert rows["trainer.worker"].env["TRAINER_BROKER_URL"].startswith("redis+socket://")
    assert "TRAINER_DEVICE" not in rows["evaluator.worker"].env
    assert rows["teacher_gateway.worker"].env["TEACHER_KEY_QWEN"] == "hush"


def test_what_is_passed_may_be_sent_to_a_teacher_and_nothing_else(stack, tmp_path, monkeypatch):
    monkeypatch.setenv("ANY_KEY", "a")
    monkeypatch.setenv("ONE_KEY", "b")
    rows = table(stack(pass_env=("ANY_KEY", "ONE_KEY@llm.example")), tmp_path)
    env = rows["teacher_gateway.api"].env
    assert env["TEACHER_GATEWAY_SECRET_HOSTS"] == "ANY_KEY@*,ONE_KEY@llm.example"
    assert env["ONE_KEY"] == "b"
    assert "TEACHER_GATEWAY_SECRET_HOSTS" not in rows["trainer.worker"].env
    unasked = table(stack(), tmp_path)["teacher_gateway.worker"].env
    assert "TEACHER_GATEWAY_SECRET_HOSTS" not in unasked
    monkeypatch.setenv("TEACHER_GATEWAY_SECRET_HOSTS", "ANY_KEY@llm.example")
    rows = table(stack(pass_env=("ANY_KEY",)), tmp_path)
    assert rows["teacher_gateway.api"].env["TEACHER_GATEWAY_SECRET_HOSTS"] == "ANY_KEY@llm.example"


def test_a_variable_to_pass_that_is_not_set_is_named(stack, tmp_path):
    with pytest.raises(StackError, match="--pass-env names NO_SUCH_KEY"):
        stack(pass_env=("NO_SUCH_KEY",)).table(tmp_path)


def test_file_references_open_below_the_models_folder_and_those_told(stack, tmp_path):
    one = stack()
    env = table(one, tmp_path)["trainer.worker"].env
    assert env["TRAINER_FILE_ROOTS"] == str(one.root / "models")
    two = stack(file_roots=(tmp_path / "a", tmp_path / "b"))
    roots = table(two, tmp_path)["teacher_gateway.worker"].env["TEACHER_GATEWAY_FILE_ROOTS"]
    told = [two.root / "models", tmp_path / "a", tmp_path / "b"]
    assert roots.split(os.pathsep) == list(map(str, told))


def test_weights_are_fetched_into_one_folder_from_the_users_hub(stack, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.com")
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("EVALUATOR_CACHE_DIR", "/large/disk")
    one = stack()
    rows = table(one, tmp_path)
    assert rows["trainer.worker"].env["TRAINER_CACHE_DIR"] == str(one.root / "cache")
    assert rows["evaluator.worker"].env["EVALUATOR_CACHE_DIR"] == "/large/disk"
    assert "DATASET_BUILDER_CACHE_DIR" not in rows["dataset_builder.worker"].env
    assert rows["trainer.worker"].env["HF_ENDPOINT"] == "https://hub.example.com"
    assert "HF_TOKEN" not in rows["trainer.worker"].env


def test_the_pepper_is_made_once_in_a_private_file(stack):
    one = stack()
    assert one._key_pepper() == one._key_pepper()
    assert stat.S_IMODE((one.root / "secrets" / "key_pepper").stat().st_mode) == 0o600


def test_options_come_from_the_environment():
    env = {
        "STILLHOUSE_BROKER_URL": "amqp://h//",
        "STILLHOUSE_STORE_ENDPOINT_URL": "https://s3",
        "STILLHOUSE_STORE_ACCESS_KEY": "k",
        "STILLHOUSE_STORE_SECRET_KEY": "s",
        "STILLHOUSE_STORE_BUCKET": "b",
    }
    options = StackOptions.from_environment(env, api_port=8000)
    assert options.broker_url == "amqp://h//"
    assert options.store == Store("https://s3", "b", "k", "s")
    assert (options.database_url, options.api_port) == (None, 8000)


def test_a_store_without_its_keys_is_refused_by_name():
    with pytest.raises(StackError, match="STILLHOUSE_STORE_SECRET_KEY"):
        StackOptions.from_environment(
            {"STILLHOUSE_STORE_ENDPOINT_URL": "https://s3", "STILLHOUSE_STORE_ACCESS_KEY": "k"}
        )


def test_without_a_stack_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(StackError, match="start one with `stillhouse up`"):
        read_stack(tmp_path)
