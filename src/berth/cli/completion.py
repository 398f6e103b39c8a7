"""`berth completion`: the scripts that make a shell ask `berth __complete` how a line may go on."""

from __future__ import annotations

import argparse

from berth.cli.output import emit
from berth.cli.parser import Handler, Parser

# The protocol of `berth __complete WORD…` (the last word is the one being typed): lines "CANDIDATE<TAB>DESCRIPTION",
# and at the end possibly ":file" or ":directory", for names that the shell completes best itself.
BASH = r"""# berth completion for bash. Use it: eval "$(berth completion bash)"
_berth() {
    # Whole words: bash splits at ':' and '=', which image names and settings have in them.
    local line="${COMP_LINE:0:COMP_POINT}" word current breaks="" prefix="" candidate
    local -a words
    COMPREPLY=()
    if declare -F _get_comp_words_by_ref >/dev/null; then
        local cur words cword prev
        _get_comp_words_by_ref -n =: cur words cword 2>/dev/null
        words=("${words[@]:1:cword}")
    else
        read -ra words <<<"$line"
        words=("${words[@]:1}")
        [[ $line == *[[:space:]] ]] && words+=("")
    fi
    current="${words[${#words[@]}-1]}"
    # What of the word readline will not replace, because it ends at a break character.
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=":"
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+="="
    [[ -n $breaks && $current == *[$breaks]* ]] && prefix="${current%"${current##*[$breaks]}"}"
    while IFS= read -r candidate; do
        case $candidate in
        :file | :directory)
            local kind=-f
            [[ $candidate == :directory ]] && kind=-d
            compopt -o filenames 2>/dev/null
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen "$kind" -- "${current#"$prefix"}")
            ;;
        *)
            candidate="${candidate%%$'\t'*}"
            [[ $candidate == "$current"* ]] && COMPREPLY+=("${candidate#"$prefix"}")
            [[ $candidate == *= ]] && compopt -o nospace 2>/dev/null
            ;;
        esac
    done < <(berth __complete "${words[@]}" 2>/dev/null)
}
complete -F _berth berth
"""

ZSH = r"""#compdef berth
# berth completion for zsh. Use it: eval "$(berth completion zsh)" after compinit, or as a file _berth in $fpath.
_berth() {
    local line files="" value
    local -a plain settings
    while IFS= read -r line; do
        case $line in
        :file) files="-f" ;;
        :directory) files="-/" ;;
        *)
            value="${line%%$'\t'*}"
            if [[ $line == *$'\t'* ]]; then
                line="${value//:/\\:}:${line#*$'\t'}"
            else
                line="${value//:/\\:}"
            fi
            if [[ $value == *= ]]; then settings+=("$line"); else plain+=("$line"); fi
            ;;
        esac
    done < <(berth __complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)
    (( ${#plain} )) && _describe -V 'berth' plain
    (( ${#settings} )) && _describe -V 'berth' settings -S ''
    if [[ $files == "-f" ]]; then _files; elif [[ $files == "-/" ]]; then _files -/; fi
    return 0
}
if [[ $funcstack[1] == _berth ]]; then _berth "$@"; else compdef _berth berth; fi
"""

FISH = r"""# berth completion for fish. Use it: berth completion fish | source
function __berth_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in (berth __complete $words[2..-1] "$current" 2>/dev/null)
        switch $line
            case :file
                __fish_complete_path "$current"
            case :directory
                __fish_complete_directories "$current"
            case '*'
                echo $line
        end
    end
end
complete -c berth -f -a '(__berth_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def _configure(parser: Parser) -> Handler:
    parser.describe(
        """
        Prints the script that lets a shell complete berth's commands, options, machine names and image references.
        """,
        examples=(
            ("echo 'eval \"$(berth completion bash)\"' >> ~/.bashrc", "for bash, from the next shell on"),
            ("echo 'eval \"$(berth completion zsh)\"' >> ~/.zshrc", "for zsh, behind compinit"),
            ("berth completion fish > ~/.config/fish/completions/berth.fish", "for fish"),
        ),
    )
    parser.argument("shell", choices=tuple(SCRIPTS), metavar="bash|zsh|fish", help="which shell")
    parser.add_common()
    return _completion


def _completion(args: argparse.Namespace) -> int:
    emit(SCRIPTS[args.shell].rstrip("\n"))
    return 0


COMMANDS = {"completion": _configure}
