"""Adapters and weights to and from Hugging Face: PEFT's format, and checkpoints.

`export_peft` writes a tree with adapters as a folder that PEFT, vLLM, SGLang or
llama.cpp load, and `import_peft` reads such a folder into a plain tree.
`import_weights` reads a checkpoint into a tree, and `export_weights` writes it again
with the updates in its weights. All take a map, which names the PyTorch modules that
each leaf of the tree is; `transformers_names` and `find_names` make it. The files work
on trees, names and arrays, and not on jaxprs.

In reading order:

  names.py            the map: patterns of paths to names, `transformers_names`
  module_kinds.py     the kinds of PyTorch modules: how each stores weight and adapter
  modules.py          the modules that one leaf is, its values as their tensors
  module_adapters.py  the adapter of a weight as those of its modules, and back
  module_plan.py      the modules of all trained leaves, before an array is read
  tensor_keys.py      the keys of tensors in a PEFT file
  name_expressions.py  regular expressions on names, matched in bounded time
  module_rules.py     which modules a config names, with which rank and scale
  folder_files.py     the files of a folder, written together or not at all
  checkpoint.py       a PyTorch checkpoint, read tensor by tensor
  safetensors_writer.py  safetensors files, written tensor by tensor
  peft_config.py      PEFT's adapter_config.json
  peft_folder.py      PEFT's folder: the config and the tensors of an adapter
  export_checks.py    the checks that PEFT loads an export as intended
  model_class.py      the class of a checkpoint's model, and the names of its modules
  consumers.py        the programs that load PEFT's format, and what each takes
  consumer_checks.py  the checks that these programs load an export as intended
  module_groups.py    the modules that a program loads only together, and their sizes
  fit_factors.py      factors as a program reads them: zeros, one rank, one alpha
  export_peft.py      `export_peft`
  fused_experts.py    adapters of experts that one parameter fuses, as separate ones
  sort_tensors.py     the tensors of a folder, sorted to the leaves of a tree
  trained_leaves.py   the leaves that a folder trains in full, and their new values
  import_peft.py      `import_peft`
  match_tensors.py    the tensors that a weight is, compared in every value
  closest_tensor.py   the tensor closest to an unmatched weight, for error messages
  equal_tensors.py    the choice between tensors of equal values, by their names
  name_patterns.py    the map in few lines, with stars for numbers
  progress.py         a progress bar on a terminal
  quantized_tensors.py  tensors that are stored in 4 bits, or refused
  find_names.py       `find_names`
  gguf_file.py        a GGUF file as the checkpoint that it was converted from
  model_tensors.py    the tensors of a model, under the names of its modules
  tensor_sources.py   the tensors that each leaf is, by the map and by shapes
  leaf_layout.py      the layers of a leaf: what to read, and how to join it
  fill_leaf.py        one leaf, filled layer by layer on its devices
  import_weights.py   `import_weights`
  merge_tensors.py    a tensor with the update of its module
  export_weights.py   `export_weights`
"""
