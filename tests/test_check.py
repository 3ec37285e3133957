"""``python -m fastattn check`` finds what is wrong, and nothing where all is right."""

from fastattn import check, functional


def test_every_family_is_checked_on_every_level(capsys):
    assert check.run_check()
    lines = capsys.readouterr().out.splitlines()[1:]
    for name, obstacle in check._C.cpu_levels():
        own = [line for line in lines if line.split()[0] == name]
        assert len(own) == (1 if obstacle else 3 * len(list(check._cases())))
        assert all(line.endswith("ok") for line in own) or obstacle


def test_a_wrong_result_is_found(capsys, monkeypatch):
    right = functional.swiglu
    monkeypatch.setattr(functional, "swiglu", lambda gate, up: right(gate, up) * 1.01)
    assert not check.run_check()
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed and all("swiglu" in line for line in failed)
