"""Who is asked: a model with all that is needed to put a question to it and to judge what it answers."""

import dataclasses

from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Placing
from coconut.tasks import Task
from coconut.tokenizers import TextFormat, TokenizedExample, Tokenizer, encode_example
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is asked: how questions are written for it, and how its answers are judged.

    Attributes:
      model: the model.
      tokenizer: its tokenizer.
      method: how an example is written down.
      placing: the stage it has reached, and its method's options.
      task: judges answers.
      text_format: how the parts of an example are written.
    """

    model: Model
    tokenizer: Tokenizer
    method: Method
    placing: Placing
    task: Task
    text_format: TextFormat

    @property
    def asked(self) -> tuple[Model, Tokenizer, Method, Placing]:
        """What functions that ask questions take first."""
        return self.model, self.tokenizer, self.method, self.placing

    def tokenize(self, example: Example) -> TokenizedExample:
        """The ids of an example."""
        return encode_example(self.tokenizer, example, self.text_format)
