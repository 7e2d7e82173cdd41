"""Importing striped_hf before transformers, after it, during its import, and without it."""

import pytest
from fresh_process import python


@pytest.mark.slow
def test_the_optimizer_alone_does_not_import_transformers() -> None:
    script = """
        import importlib, inspect, sys, warnings
        warnings.simplefilter("error", UserWarning)

        import striped_hf
        assert "torch" not in sys.modules and striped_hf.__version__
        from striped_hf.optim import StripedAdamW
        import torch
        weight = torch.nn.Parameter(torch.ones(4, 6))
        weight.sum().backward()
        StripedAdamW([weight]).step()
        assert (weight < 1).all()
        assert not {"transformers", "accelerate", "datasets"} & set(sys.modules)
        assert striped_hf.StripedAdamW is striped_hf.optim.StripedAdamW is StripedAdamW

        # the names come with transformers, as soon as they can be used
        import transformers.training_args as module
        assert "transformers.trainer" not in sys.modules
        args = module.TrainingArguments("out", optim="striped_adamw_8bit", use_cpu=True)
        from transformers import Trainer
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert (cls, kwargs["momentum_dtype"]) == (StripedAdamW, "int8")
        assert inspect.getsource(Trainer.train)

        # and they come again with modules that are loaded again
        importlib.reload(module)
        module.TrainingArguments("out", optim="striped_adamw_8bit", use_cpu=True)
        trainer = importlib.reload(sys.modules["transformers.trainer"])
        assert trainer.Trainer is not Trainer
        assert trainer.Trainer.get_optimizer_cls_and_kwargs(args)[0] is StripedAdamW
    """
    python(script)


@pytest.mark.slow
def test_striped_hf_imported_during_the_import_of_transformers() -> None:
    """An import hook imports striped_hf while ``transformers.trainer`` is half imported."""
    script = """
        import importlib.abc, importlib.util, sys, warnings
        warnings.simplefilter("error", UserWarning)

        class Hook(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name != "transformers.training_args":
                    return None
                sys.meta_path.remove(self)
                spec = importlib.util.find_spec(name)
                load = spec.loader.exec_module
                def exec_module(module):
                    spec.loader.exec_module = load
                    load(module)
                    import striped_hf
                    assert not hasattr(sys.modules["transformers.trainer"], "Trainer")
                spec.loader.exec_module = exec_module
                return spec

        sys.meta_path.insert(0, Hook())
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw_4bit", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum_dtype"] == "int4"
    """
    python(script)


@pytest.mark.slow
def test_threads_that_import_both() -> None:
    script = """
        import importlib, sys, threading, warnings
        warnings.simplefilter("error", UserWarning)
        start, errors = threading.Barrier(4), []

        def load(name):
            try:
                start.wait()
                importlib.import_module(name)
            except BaseException as error:
                errors.append(error)

        # one thread for transformers: two fail at times without striped_hf, in circular imports
        modules = ["transformers.trainer", "striped_hf", "striped_hf.optim", "striped_hf.trainer"]
        threads = [threading.Thread(target=load, args=(name,)) for name in modules]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum_dtype"] == "float32"
    """
    python(script)


@pytest.mark.slow
def test_an_error_in_transformers_is_reported_unchanged() -> None:
    script = """
        import sys, traceback, warnings
        warnings.simplefilter("error", UserWarning)
        import striped_hf
        sys.modules["transformers.hyperparameter_search"] = None  # it cannot be imported any more
        try:
            import transformers.trainer
        except ImportError as error:
            assert "transformers.hyperparameter_search" in str(error), error
            assert error.__cause__ is error.__context__ is None
            frames = traceback.extract_tb(error.__traceback__)
            assert frames[-1].filename.endswith("trainer.py"), frames
            assert frames[-1].line.startswith("from .hyperparameter_search import"), frames
        else:
            raise SystemExit("it was imported")
        assert "transformers.trainer" not in sys.modules
        # once it is repaired, the names are there
        del sys.modules["transformers.hyperparameter_search"]
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is striped_hf.StripedAdamW
    """
    python(script)


@pytest.mark.slow
def test_an_error_in_striped_hf_leaves_transformers_alone() -> None:
    """The message does not mention changed internals."""
    script = """
        import sys, warnings
        import striped_hf
        sys.modules["striped_hf.optim.rounding"] = None  # it cannot be imported any more
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers import Trainer, TrainingArguments
        messages = {str(w.message) for w in caught if "striped_hf" in str(w.message)}
        assert len(messages) == 1, messages
        (message,) = messages
        assert "striped_hf.optim.rounding" in message and "internals" not in message, message
        TrainingArguments("out", optim="adamw_torch", use_cpu=True)
    """
    python(script)


@pytest.mark.slow
def test_the_optimizer_works_without_transformers() -> None:
    script = """
        import sys
        import torch

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "transformers":
                    raise ModuleNotFoundError(name)

        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: (
            None if name == "transformers" else found(name, *rest)
        )
        sys.meta_path.insert(0, Missing())
        import striped_hf
        striped_hf.StripedAdamW([torch.nn.Parameter(torch.zeros(2, 2))])
        assert "transformers" not in sys.modules
    """
    python(script)
