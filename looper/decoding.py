"""Decoding of many rows at once: slots that take rows, and a step that CUDA graphs can replay.

A slot whose row has finished takes the next prompt while its neighbours go on.
A prompt is prefilled up to its last token; that token is the first step's input, so that logits are computed and
sampled in one place only.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from looper.compiling import compiled_by_rows, compiles_on
from looper.pieces import compiled_pieces
from looper.sampler import choose
from looper.slots import ATTENTION, Beginning, PrefillCache, Ragged, SlotCache

LENGTH_MULTIPLE = 64  # attention reads the cache up to a multiple of this: few graphs, aligned masks
PREFILL_TOKENS = 8192  # most tokens, padding included, in one prefill pass: bounds its activations
# Of a prefill pass. On Hopper GPUs PyTorch prefers cuDNN's, which makes a plan, some 30 ms long, for each new number of rows
# and tokens; prompts bring a new one nearly every time.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def decoding_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switches the model to slot attention, evaluation mode and inference mode; afterwards it is as it was."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION)
    model.eval()
    try:
        pieces = compiled_pieces(model) if compiles_on(model.device) else nullcontext()
        with torch.inference_mode(), sdpa_kernel(KERNELS), pieces:
            yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


class Decoder:
    """Slots of running rows and the tables that their tokens go to; all of a step's state stays on the device.

    rows: the most rows a `start` may announce; max_new_tokens: the most new tokens a row may get. Use it inside
    `decoding_mode(model)`. On CUDA each (batch, length) pair's first step runs eagerly, which compiles what is not yet
    compiled for it, its second is captured as a CUDA graph, later ones replay it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        rows: int,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
    ):
        self.model, self.device = model, model.device
        self.compiled: set[bool] = set()  # whether for sampling, for greedy rows alone
        self.choose = compiled_by_rows(choose, exact_division=False) if compiles_on(self.device) else choose
        self.slots = slots
        self.cache = SlotCache(slots, -(-max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        self.eos = self._tensor(sorted(eos_token_ids))
        self.slot_index = self._tensor(range(slots))
        self.position_index = self._tensor(range(self.cache.max_length))
        # One value a slot. A free slot is `done` and its row is the tables' spare last one.
        self.row = torch.full((slots,), rows, device=self.device)
        self.token, self.position, self.count, self.limit = self._tensor([0] * slots).repeat(4, 1)
        self.temperature = torch.zeros(slots, device=self.device)
        self.done = torch.ones(slots, dtype=torch.bool, device=self.device)
        # One line a row; the last column takes what finished rows still write.
        self.tokens = torch.zeros(rows + 1, max_new_tokens + 1, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(rows + 1, max_new_tokens + 1, device=self.device)
        self.uniforms = torch.zeros(rows + 1, max_new_tokens + 1, dtype=torch.float64, device=self.device)
        self.sampling = True
        self.prompts: list[Sequence[int] | None] = [None] * slots  # whose prefilled keys a slot still holds
        self.flash = self.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
        self.starts = torch.arange(slots + 1, dtype=torch.int32, device=self.device)
        self.graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph | None] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def _tensor(self, values: Sequence) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self.device)

    def start(self, rows: int, seed: int, sampling: bool, beginning: Sequence[int] = ()) -> None:
        """Begins a new set of rows: their random numbers depend on the seed, the set's size, the row and the token.

        beginning: tokens that every prompt of the set begins with, and has more after; they are computed here, once.
        """
        generator = torch.Generator().manual_seed(seed)
        width = self.uniforms.shape[1]
        self.uniforms[:rows] = torch.rand(rows, width, dtype=torch.float64, generator=generator).to(self.device)
        self.sampling = sampling
        self.prompts = [None] * self.slots
        self.done.fill_(True)
        self.beginning = Beginning(len(beginning))
        if beginning:
            self.model.base_model(
                input_ids=self._tensor(beginning)[None],
                position_ids=self.position_index[None, : len(beginning)],
                past_key_values=self.beginning,
                use_cache=True,
            )
        if compiles_on(self.device) and sampling not in self.compiled:
            self.compiled.add(sampling)
            self._compile()

    def _compile(self) -> None:
        """Compiles on sizes that depend on no prompt: the first ones decide in which order a sum is taken, and of several
        processes each would meet others."""
        tokens = [0] * min(LENGTH_MULTIPLE + 1, self.cache.max_length)
        self._prefill([(tokens, slot) for slot in range(min(2, self.slots))])
        logits = torch.zeros(self.slots, self.model.config.vocab_size, dtype=self.model.dtype, device=self.device)
        self.choose(logits, self.temperature, self.uniforms[self.row, self.count] if self.sampling else None)

    def admit(
        self,
        slots: Sequence[int],
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        limits: Sequence[int],
    ) -> None:
        """Puts rows into free slots. A prompt that some slot already holds (another arm's) is copied, not computed."""
        held = {tuple(prompt): slot for slot, prompt in enumerate(self.prompts) if prompt is not None}
        copies, new, repeats = [], {}, []
        for slot, prompt in zip(slots, prompts):
            if (source := held.get(tuple(prompt))) is not None:
                copies.append((source, slot))
            elif tuple(prompt) in new:
                repeats.append((new[tuple(prompt)], slot))
            else:
                new[tuple(prompt)] = slot
            self.prompts[slot] = prompt
        longest = max(len(prompt) for prompt in prompts) - 1
        self._copy(copies, longest)  # first: the prefill may overwrite their sources
        self._prefill([(prompt, slot) for prompt, slot in new.items() if len(prompt) > 1])
        self._copy(repeats, longest)
        index = self._tensor(slots)
        self.row[index] = self._tensor(rows)
        self.token[index] = self._tensor([prompt[-1] for prompt in prompts])
        self.position[index] = self._tensor([len(prompt) - 1 for prompt in prompts])
        self.limit[index] = self._tensor(limits)
        self.temperature[index] = torch.tensor(temperatures, dtype=torch.float32, device=self.device)
        self.count[index] = 0
        self.done[index] = False

    def _copy(self, pairs: list[tuple[int, int]], length: int) -> None:
        pairs = [(source, target) for source, target in pairs if source != target]
        if pairs and length:
            self.cache.copy(*self._tensor(pairs).T, length)

    def _prefill(self, prompts: list[tuple[Sequence[int], int]]) -> None:
        """Right-padded passes under causal attention: what stands after a prompt's end cannot reach it."""
        shared = self.beginning.tokens
        prompts = sorted(prompts, key=lambda pair: len(pair[0]), reverse=True)
        while prompts:
            width = len(prompts[0][0]) - 1 - shared
            taken, prompts = prompts[: max(1, PREFILL_TOKENS // width)], prompts[max(1, PREFILL_TOKENS // width) :]
            ids = [list(prompt[shared:-1]) + [0] * (width + 1 + shared - len(prompt)) for prompt, _ in taken]
            self.model.base_model(
                input_ids=torch.tensor(ids, device=self.device),
                position_ids=self.position_index[None, shared : shared + width],
                past_key_values=PrefillCache(self.cache, self._tensor([slot for _, slot in taken]), self.beginning),
                use_cache=True,
            )

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Moves rows, with `length` cache positions at most, to free slots; the slots they leave become free."""
        self._copy(list(zip(sources, targets)), length)
        here, there = self._tensor(sources), self._tensor(targets)
        for state in (self.row, self.token, self.position, self.count, self.limit, self.temperature, self.done):
            state[there] = state[here]
        self.done[here] = True
        for source, target in zip(sources, targets):
            self.prompts[target] = self.prompts[source]

    def step(self, batch: int, length: int) -> None:
        """One new token for each running row of slots 0 .. batch-1; `length`: more than any running row's position."""
        length = min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.cache.max_length)
        if self.flash:
            length = self.cache.max_length  # costs nothing where each row reads its own keys only, and saves graphs
        shape = (batch, length, self.sampling)
        if self.device.type != "cuda" or shape not in self.graphs:
            self.graphs[shape] = None  # the eager step is also the warm-up that a capture needs
            self._step(batch, length)
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                self._step(batch, length)
        self.graphs[shape].replay()

    def _step(self, batch: int, length: int) -> None:
        row, position, count, done = (state[:batch] for state in (self.row, self.position, self.count, self.done))
        self.cache.at = (self.slot_index[:batch], position, length)
        logits = self.model(
            input_ids=self.token[:batch, None],
            position_ids=position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **self._attention(position, length),
        ).logits[:, -1]
        uniforms = self.uniforms[row, count] if self.sampling else None
        token, logprob = self.choose(logits, self.temperature[:batch], uniforms)
        # A finished row writes on just past its end, where nobody reads.
        self.tokens[row, count] = token
        self.logprobs[row, count] = logprob
        running = ~done
        self.token[:batch] = torch.where(running, token, self.token[:batch])
        position += running
        count += running
        done |= (token[:, None] == self.eos).any(-1) | (count >= self.limit[:batch])

    def _attention(self, position: torch.Tensor, length: int) -> dict:
        """What tells attention that a row at position p may use keys 0 .. p."""
        if self.flash:
            starts = self.starts[: len(position) + 1]
            return {"ragged": Ragged((position + 1).int(), starts, starts * self.cache.max_length)}
        hidden = self.position_index[:length] > position[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
        return {"attention_mask": mask.masked_fill_(hidden, float("-inf"))[:, None, None]}

    def status(self, batch: int) -> tuple[list[bool], list[int]]:
        """Of slots 0 .. batch-1: whether each row is done, and its tokens so far. Waits for the device."""
        done, count = torch.stack((self.done[:batch].long(), self.count[:batch])).tolist()
        return [bool(flag) for flag in done], count
