"""Suggestions for wrong settings, presets, commands and options, by meaning first, then by spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

SAME_MEANING = {
    "lr learningrate stepsize baselr initlr maxlr peaklr eta alpha": "learning_rate",
    "wd decay l2 l2reg regularization regularisation": "weight_decay",
    "bs batchsize trainbatchsize minibatch perdevicetrainbatchsize": "batch",
    "epochs epoch numepochs maxepochs nepochs iterations iters numiters maxiter maxiters maxsteps numsteps nsteps "
    "totalsteps trainsteps updates": "steps",
    "randomseed rngseed manualseed randomstate rng": "seed",
    "gpus numgpus ngpus ngpu devices numworkers nworkers nworker worldsize nproc processes ranks replicas": "workers",
    "gpu cuda accelerator usegpu usecuda cpu": "device",
    "nway ways kway numways numclasses nclasses classes": "way",
    "kshot shot nshot nshots numshots support nsupport": "shots",
    "queries nquery numquery numqueries nqueries queryshots": "query",
    "nepisodes numepisodes tasks ntasks evalepisodes": "episodes",
    "output outdir outputdir savedir save logdir rundir workdir dir folder exp expdir ckptdir checkpointdir": "out",
    "data dataset datadir dataroot root path source datapath datasetpath url": "uri",
    "trackinguri mlflowuri mlflowtrackinguri server trackingurl": "uri",
    "experimentname project expname": "experiment",
    "registermodel registeredmodel registeredmodelname modelname registername": "register_as",
    "amp fp16 bf16 bfloat16 half mixedprecision dtype floatprecision": "precision",
    "clip gradclip clipgrad gradientclip maxgradnorm gradnorm gradientclipval gradclipnorm": "clip_norm",
    "scheduler lrscheduler lrschedule learningrateschedule decayschedule": "schedule",
    "opt optim optimiser": "optimizer",
    "backbone arch architecture network net featureextractor": "encoder",
    "latentdim latentsize zdim dimz nlatent latents z": "latent",
    "hidden hiddendim hiddensize dmodel dff dim embeddim": "width",
    "filters nfilters numfilters nchannels convchannels": "channels",
    "nheads numheads attentionheads nhead": "heads",
    "nlayers numlayers depth blocks nblocks": "layers",
    "evalevery valevery validateevery valinterval evalinterval evaluateevery evalfreq valfreq interval": "every",
    "saveevery saveinterval savesteps ckptevery checkpointinterval savefreq checkpointsteps": "checkpoint_every",
    "logevery loginterval loggingsteps logfreq printfreq printevery logsteps": "log_every",
    "temp tau softmaxtemperature t": "temperature",
    "nsamples numsamples mcsamples montecarlosamples mc": "samples",
    "emsteps emiters emiter emiterations niterem": "em_iterations",
    "ncomponents numcomponents clusters nclusters k numclusters mixtures": "components",
    "kl klweight klbeta betakl kldweight": "beta",
    "imgsize imagesize resolution inputsize size": "image_size",
    "numthreads nthreads torchthreads omp": "threads",
    "cpus ncpus numcpus cpuperworker": "cpus_per_worker",
    "shuffle buffer buffersize shufflesize": "shuffle_buffer",
    "loader dataloader": "reader",
    "memory cache memorylimit": "memory_limit_mb",
    "setsize m npoints numpoints pointsperepisode": "set_size",
    "modelselection select checkpointselection bestmodel": "selection",
    "init initialization initialisation weightinit": "start",
    "channelslast memoryformat": "channels_last",
    "torchcompile jit": "compile",
    "crop cropscale mincrop minscale": "crop_area",
    "projectionhead projdim projectordims head mlp": "projector",
    "aug augment augmentation augmentations transforms": "views",
    "retries maxretries restarts failures": "max_failures",
    "plots plot figure": "figures",
    "cluster rayaddress master": "address",
    "backend executor runner": "engine",
    "eval evaluation test score": "evaluate",
    "predict infer inference label": "classify",
    "fit training trainer metatrain learn": "train",
    "simclr contrastive ssl pretraining": "pretrain",
    "sweep search hpo optimize optimise hyperopt gridsearch": "tune",
    "encode embed extract embeddings": "features",
    "visualize visualise draw image": "figure",
    "benchmark speed profile perf": "bench",
    "diagnose env info health status": "doctor",
    "validate integrity checksum": "verify",
    "download convert import preprocess build make": "prepare",
    "registry versions list ls": "models",
    "diff versus vs": "compare",
    "champion release deploy": "promote",
    "upload push log mlflow": "track",
    "example quickstart tutorial": "demo",
    "results report readme": "table",
    "settings configure configuration": "config",
}
"""Usual words of other programs, in lower case without separators, and what they are called here. A word may be a key
of several sections."""
SECTIONS = {
    "training meta optimizer optim optimization optimisation hparams hyperparameters": "train",
    "eval evaluation val valid validate test": "validation",
    "dataset datasets dataloader input": "data",
    "mlflow logging logger wandb registry log": "tracking",
    "network net encoder arch vae": "model",
    "ssl simclr contrastive pretraining": "pretrain",
    "system cluster ray runtime trainer hardware compute distributed": "run",
    "adaptation inference em": "adapt",
    "methods algorithm algo learner metalearner tasks": "method",
}


def same_meaning(word: str, table: dict[str, str] = SAME_MEANING) -> list[str]:
    """What a usual word is called here; empty if it is not in the table."""
    return [ours for words, ours in table.items() if _plain(word) in words.split()]


def suggestion(word: str, known: Sequence[str]) -> str:
    """End of an error message: the known words that are meant or spelt alike, or all of them."""
    return did_you_mean(similar(word, known)) or (f"; known: {', '.join(known)}" if known else "")


def did_you_mean(names: Sequence[str]) -> str:
    """End of an error message that offers these names; empty without any."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def similar(word: str, known: Iterable[str]) -> list[str]:
    """Known words for a wrong one, at most three: the same but for case and separators, of the same meaning, of similar
    spelling, or, for names of several parts, with all of its parts."""
    plain = {name: _plain(name) for name in known}
    wanted = _plain(word)
    exact = [name for name, text in plain.items() if text == wanted]
    meant = [name for name in same_meaning(word) if name in plain]
    # A short word is close to many that mean something else.
    cutoff = 0.8 if len(wanted) > 4 else 0.75
    close = difflib.get_close_matches(wanted, list(plain.values()), n=1, cutoff=cutoff)
    spelt = [name for name, text in plain.items() if text in close]
    parts = set(re.findall(r"[a-z]+|\d+", word.lower()))
    holding = [name for name in plain if parts and parts <= set(re.findall(r"[a-z]+|\d+", name.lower()))]
    return (exact or meant or spelt or sorted(holding, key=len))[:3]


def setting_suggestion(dotted: str, keys: Sequence[str]) -> str:
    """End of the error message about an unknown dotted key, where `keys` are all dotted keys of the settings.

    A key of the same section is preferred; else the key is named with the section that has it.
    """
    section, _, word = dotted.rpartition(".")
    section = section.split(".")[-1]
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys if "." in key))
    if dotted in sections:
        return f"; it is a section: name one of its keys, {dotted}.KEY"
    if section and section not in sections:
        close = same_meaning(section, SECTIONS) or similar(section, sections)
        section = close[0] if close else ""
    in_section = {key.partition(".")[2]: key for key in keys if section and key.startswith(f"{section}.")}
    if word in in_section:
        return did_you_mean([in_section[word]])
    found = [in_section[name] for name in similar(word, in_section)]
    by_name: dict[str, list[str]] = {}
    for key in keys:
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    if not found:
        found = [key for name in similar(word, by_name) for key in by_name[name]][:4]
    if found:
        return did_you_mean(found)
    known = list(in_section) or [*sections, *(key for key in keys if "." not in key)]
    return f"; known{f' in [{section}]' if in_section else ''}: {', '.join(known)}"


def _plain(word: str) -> str:
    """Lower case without `-`, `_`, `.` and spaces."""
    return re.sub(r"[-_. ]", "", word).lower()
