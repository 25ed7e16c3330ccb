"""Training steps of Hugging Face's GPT-2 in PyTorch, on the device that JAX uses, to compare ours with.

Without thoughts, and with thoughts by two loops of our own: one goes on from the cache of keys and values, the other
does so, too, but after every thought takes all inputs apart into single positions and stacks them again, and forms the
logits of every position it passes. That is how the official code of Coconut works.

None of them has dropout. AdamW is PyTorch's fused one. In bfloat16 the parameters stay float32, as ours do, and PyTorch
casts (autocast); in float32 a GPU may form products in TensorFloat-32, as JAX's default is there.
"""

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from coconut.models.config import DecoderConfig
from coconut.training.optimizer import OptimizerConfig
from coconut.types import IGNORED_LABEL


def load() -> None:
    """Imports PyTorch and Hugging Face's models, which takes as long as compiling a step: do both at once."""
    importlib.import_module("torch")
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")


class TorchTrainer:
    """A GPT-2 of Hugging Face's in training; all steps train the one model.

    Attributes:
      described: what the steps are run with.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig,
        parameters: int | None = None,
        dtype: str = "float32",
    ) -> None:
        """Builds model and optimizer.

        Args:
          decoder: sizes.
          optimizer: AdamW's numbers.
          parameters: how many the model must have; None for no check.
          dtype: of activations; parameters are float32.

        Raises:
          RuntimeError: PyTorch does not reach JAX's device.
          AssertionError: the models differ in their number of parameters.
        """
        import torch
        import transformers

        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} does not reach the GPU that JAX uses")
        affinity = getattr(os, "sched_getaffinity", None)
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self.decoder, self.dtype = decoder, dtype
        config = transformers.GPT2Config(
            vocab_size=decoder.vocabulary,
            n_positions=decoder.max_positions,
            n_embd=decoder.embed_dim,
            n_layer=decoder.num_layers,
            n_head=decoder.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        model: Any = transformers.GPT2LMHeadModel(config)
        self.model = model.train().to(self.device)
        self._as_set: tuple[str, bool] | None = None
        theirs = sum(x.numel() for x in self.model.parameters())
        if parameters is not None and theirs != parameters:
            raise AssertionError(f"the models differ: {parameters} parameters against {theirs}")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.described = {
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "torch_threads": torch.get_num_threads(),
            "torch_device": self.device,
            "torch_float32_matmul_precision": torch.get_float32_matmul_precision(),
            "optimizer": "torch.optim.AdamW(fused=True)",
        }

    def plain(
        self, tokens: np.ndarray, answer: int, *, attention: str = "sdpa", fused_activation: bool = False
    ) -> Callable[[], None]:
        """A step without thoughts, as favourable as can be: logits at the labels alone.

        Args:
          tokens: ``[B, T]``.
          answer: columns at the end that are labelled.
          attention: Hugging Face's name of its attention.
          fused_activation: use PyTorch's own kernel of the activation, where theirs is many elementwise passes.
        """
        ids = self.ids(tokens)

        def loss() -> Any:
            self._set(attention=attention, fused_activation=fused_activation)
            hidden = self.model.transformer(input_ids=ids).last_hidden_state
            return self._loss(hidden[:, -answer - 1 : -1], ids[:, -answer:])

        return self._step(loss)

    def plain_with_labels(self, tokens: np.ndarray, answer: int) -> Callable[[], None]:
        """A step without thoughts as their users take it: ``model(input_ids, labels=labels).loss``, from all logits.

        Args:
          tokens: ``[B, T]``.
          answer: columns at the end that are labelled.
        """
        ids = self.ids(tokens)
        labels = ids.clone()
        labels[:, :-answer] = IGNORED_LABEL

        def loss() -> Any:
            self._set()
            return self.model(input_ids=ids, labels=labels).loss

        return self._step(loss)

    def thoughts_from_cache(self, tokens: np.ndarray, thoughts: int, answer: int) -> Callable[[], None]:
        """A step with thoughts as one writes it down: each pass has one input and goes on from the cache.

        Args:
          tokens: ``[B, T]``; those where thoughts stand are not read.
          thoughts: columns between prompt and answer.
          answer: columns at the end, all of them labelled.
        """
        ids = self.ids(tokens)
        return self._step(lambda: self.loss_from_cache(ids, thoughts, answer))

    def loss_from_cache(self, ids: Any, thoughts: int, answer: int) -> Any:
        """The loss of `thoughts_from_cache`, of ids ``[B, T]`` on the device."""
        import torch

        self._set()
        embeddings = self.model.transformer.wte(ids)
        read = self.model.transformer(inputs_embeds=embeddings[:, : -answer - thoughts], use_cache=True)
        for _ in range(thoughts):
            read = self.model.transformer(
                inputs_embeds=read.last_hidden_state[:, -1:], past_key_values=read.past_key_values, use_cache=True
            )
        answered = self.model.transformer(
            inputs_embeds=embeddings[:, -answer:], past_key_values=read.past_key_values, use_cache=True
        )
        hidden = torch.cat([read.last_hidden_state[:, -1:], answered.last_hidden_state[:, :-1]], 1)
        return self._loss(hidden, ids[:, -answer:])

    def thoughts_by_lists(self, tokens: np.ndarray, thoughts: int, answer: int) -> Callable[[], None]:
        """A step with thoughts whose inputs are rebuilt, position by position, after every thought.

        Args:
          tokens: ``[B, T]``; those where thoughts stand are not read.
          thoughts: columns between prompt and answer.
          answer: columns at the end, all of them labelled.
        """
        ids = self.ids(tokens)
        return self._step(lambda: self.loss_by_lists(ids, thoughts, answer))

    def loss_by_lists(self, ids: Any, thoughts: int, answer: int) -> Any:
        """The loss of `thoughts_by_lists`, of ids ``[B, T]`` on the device."""
        import torch

        self._set()
        rows, columns = ids.shape
        prompt = columns - thoughts - answer
        embeddings, cache, logits = self.model.transformer.wte(ids), None, []
        for first, last in [(0, prompt), *((x, x + 1) for x in range(prompt, prompt + thoughts))]:
            read = self.model(
                inputs_embeds=embeddings[:, first:last],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            cache = read.past_key_values
            logits.append(read.logits)
            if last == prompt + thoughts:
                break
            thought = read.hidden_states[-1][:, -1]
            single = [[embeddings[row, column] for column in range(columns)] for row in range(rows)]
            for row in range(rows):
                single[row][last] = thought[row]
            embeddings = torch.stack([torch.stack(of_row) for of_row in single])
        read = self.model(inputs_embeds=embeddings[:, -answer:], past_key_values=cache, use_cache=True)
        every = torch.cat([*logits, read.logits], 1)
        predictors = every[:, -answer - 1 : -1]
        return torch.nn.functional.cross_entropy(predictors.flatten(0, 1).float(), ids[:, -answer:].flatten())

    def watch_memory(self) -> Callable[[], dict[str, int]]:
        """Gives what says how many bytes PyTorch held at most since then; nothing on a CPU, where it counts none."""
        import torch

        if self.device == "cpu":
            return dict
        torch.cuda.reset_peak_memory_stats()
        return lambda: {"most_bytes": int(torch.cuda.max_memory_allocated())}

    def _set(self, *, attention: str = "sdpa", fused_activation: bool = False) -> None:
        """Makes the model what a step wants, if the last step wanted something else; it is shipped as the defaults."""
        from transformers.activations import ACT2FN

        if (wanted := (attention, fused_activation)) != self._as_set:
            self.model.set_attn_implementation(attention)
            activation = "gelu_pytorch_tanh" if fused_activation else self.model.config.activation_function
            for block in self.model.transformer.h:
                block.mlp.act = ACT2FN[activation]
            self._as_set = wanted

    def ids(self, tokens: np.ndarray) -> Any:
        """Tokens ``[B, T]`` on the device."""
        import torch

        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def _loss(self, hidden: Any, labels: Any) -> Any:
        import torch

        logits = self.model.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def _step(self, loss: Callable[[], Any]) -> Callable[[], None]:
        """A whole step, which returns when the device is done with it."""
        import torch

        def take() -> None:
            self.optimizer.zero_grad()
            narrow = self.dtype == "bfloat16"
            casting = torch.autocast(self.device, torch.bfloat16) if narrow else contextlib.nullcontext()
            with casting:
                value = loss()
            value.backward()
            self.optimizer.step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return take
