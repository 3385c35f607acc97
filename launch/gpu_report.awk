# What gpu_check.sh makes of its results.
#   mode=curves: two logs of `dattn train --json`: their losses, step by step, differ by at most `tolerance` (default 0.01)
#   mode=texts: two logs of `dattn generate --json`: the same text
#   mode=report: results.jsonl, the newest result of a step last: report.md on stdout, `json` the same as one JSON file; `clocks` holds
#     samples of MHz and watts

BEGIN { if (tolerance == "") tolerance = 0.01 }  # nats a symbol

# The number behind "key": in a line of JSON, or "".
function number(text, key) {
  if (!match(text, "\"" key "\":[ ]*-?[0-9.]+([eE][-+]?[0-9]+)?")) return ""
  text = substr(text, RSTART, RLENGTH)
  sub(/^[^:]*:[ ]*/, "", text)
  return text
}
# What doctor says of a library.
function detail(key,  text) {
  text = "\"" key "\":[{]\"found\":[a-z]*,\"detail\":\"[^\"]*\""
  if (!("doctor" in result) || !match(result["doctor"], text)) return "not asked"
  text = substr(result["doctor"], RSTART, RLENGTH - 1)
  sub(/^.*"detail":"/, "", text)
  return text
}
function of_step(name, key) { return (name in result) ? number(result[name], key) : "" }
function ratio(a, b) { return a == "" || b == "" || b == 0 ? "" : sprintf("%.3f", a / b) }
function tflops(gflops) { return gflops == "" ? "" : sprintf("%.1f", gflops / 1000) }
# PyTorch's line holds an object for each of its kernels.
function torch(name, direction) {
  if (!("torch" in result) || !match(result["torch"], "\"" name "\":[ ]*[{][^}]*[}]")) return ""
  return number(substr(result["torch"], RSTART, RLENGTH), direction "_tflops") * 1000
}

mode == "curves" && /"event":"step"/ {
  file = FILENAME
  if (file != first && first != "") second = file
  if (first == "") first = file
  loss[file, ++count[file]] = number($0, "loss")
}

mode == "texts" && match($0, /"text":"([^"\\]|\\.)*"/) { written[FILENAME] = substr($0, RSTART, RLENGTH) }

mode == "report" && match($0, /"step": "[^"]*"/) {
  name = substr($0, RSTART + 9, RLENGTH - 10)
  if (!(name in line)) order[++steps] = name
  line[name] = $0
  result[name] = $0
  sub(/^.*"result": /, "", result[name])
  sub(/[}]$/, "", result[name])
  status[name] = number($0, "exit")
}

function curves(  i, difference, most) {
  for (i = 1; i <= count[first]; ++i) {
    difference = loss[first, i] - loss[second, i]
    if (difference < 0) difference = -difference
    if (difference > most) most = difference
  }
  printf "{\"steps\": %d, \"largest_difference\": %g, \"tolerance\": %g}\n", count[first], most, tolerance
  exit !(count[first] > 0 && count[first] == count[second] && most <= tolerance)
}

function texts(  name, first, count, same) {
  same = 1
  for (name in written) {
    if (++count == 1) first = written[name]
    same = same && written[name] == first
  }
  printf "{\"texts\": %d, \"same\": %s}\n", count, (same ? "true" : "false")
  exit !(count == 2 && same)
}

# The mean clock of the samples near the most power.
function clock_under_load(  count, i, sample, mhz, watts, most, sum, busy) {
  while ((getline sample < clocks) > 0) {
    if (split(sample, part, /, */) != 2 || part[1] + 0 == 0) continue
    mhz[++count] = part[1] + 0
    watts[count] = part[2] + 0
    if (watts[count] > most) most = watts[count]
  }
  for (i = 1; i <= count; ++i) {
    if (watts[i] < 0.8 * most) continue
    sum += mhz[i]
    ++busy
  }
  return busy == 0 ? "no samples" : sprintf("%.0f MHz at %.0f W", sum / busy, most)
}

function attention_table(  i, part, our, key, direction, d, product) {
  product = of_step("bench_product", "gflops")
  print "\n## Attention, bf16, one kernel\n"
  print "TFLOP/s; ratios to cuDNN's graph alone, to PyTorch's cuDNN and FlashAttention, to the matrix product, and of our own kernel"
  print "(`cuda`) to the kernel chosen.\n"
  print "| seq,dim,mask | direction | TFLOP/s | of raw cuDNN | of PyTorch's cuDNN | of PyTorch's flash | of the product | `cuda` | of the chosen |"
  print "|---|---|---|---|---|---|---|---|---|"
  for (i = 1; i <= steps; ++i) {
    if (order[i] !~ /^bench_attention:[^,]*,[^,]*,[^,]*$/) continue
    key = substr(order[i], 17)
    for (d = 1; d <= 2; ++d) {
      direction = d == 1 ? "forward" : "backward"
      part = of_step(order[i], direction "_gflops")
      our = of_step(order[i] ",cuda", direction "_gflops")
      printf "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", key, direction, tflops(part),
             ratio(part, of_step("raw_cudnn:" key, direction "_gflops")), ratio(part, torch("cudnn " key, direction)),
             ratio(part, torch("flash " key, direction)), ratio(part, product), tflops(our), ratio(our, part)
    }
  }
}

function fp32_table(  i, key, direction, d, fp32, tf32) {
  print "\n## Attention, fp32, kernel `cuda`\n"
  print "| seq,dim,mask | direction | TFLOP/s | in TF32 | of fp32 |"
  print "|---|---|---|---|---|"
  for (i = 1; i <= steps; ++i) {
    if (order[i] !~ /^bench_fp32:[^,]*,[^,]*,[^,]*$/) continue
    key = substr(order[i], 12)
    for (d = 1; d <= 2; ++d) {
      direction = d == 1 ? "forward" : "backward"
      fp32 = of_step(order[i], direction "_gflops")
      tf32 = of_step(order[i] ",tf32", direction "_gflops")
      printf "| %s | %s | %s | %s | %s |\n", key, direction, tflops(fp32), tflops(tf32), ratio(tf32, fp32)
    }
  }
}

function virtual_table(  i, one) {
  print "\n## Virtual ranks on one device, as a share of one kernel\n"
  print "| mesh | forward | backward |"
  print "|---|---|---|"
  one = "bench_virtual_ranks:ring=1"
  for (i = 1; i <= steps; ++i) {
    if (order[i] !~ /^bench_virtual_ranks:/ || order[i] == one) continue
    printf "| %s | %s | %s |\n", substr(order[i], 21), ratio(of_step(order[i], "forward_gflops"), of_step(one, "forward_gflops")),
           ratio(of_step(order[i], "backward_gflops"), of_step(one, "backward_gflops"))
  }
}

function report(  i, name, failed) {
  for (i = 1; i <= steps; ++i) failed += status[order[i]] != 0
  print "# dattn on a GPU\n"
  printf "- date: %s\n- commit: %s\n- GPU: %s\n- CUDA: %s\n- cuDNN: %s\n- NCCL: %s\n- SM clock under load: %s\n", date, commit, gpu,
         detail("cuda"), detail("cudnn"), detail("nccl"), clock_under_load()
  printf "- steps: %d, %d failed%s\n", steps, failed,
         (cut == "yes" ? "; more are left, the time was up" : "")
  attention_table()
  fp32_table()
  virtual_table()
  print "\n## Other rates\n"
  printf "- matrix product, bf16: %s TFLOP/s\n", tflops(of_step("bench_product", "gflops"))
  printf "- decode: %s tokens/s, %s without graphs\n", of_step("decode", "tokens_per_s"), of_step("decode:no_graphs", "tokens_per_s")
  printf "- training, GPT-2 124M: %s tokens/s\n", of_step("gpt2", "tokens_per_s")
  print "\n## Steps\n"
  print "| step | exit | seconds | result |"
  print "|---|---|---|---|"
  printf("{\"date\": \"%s\", \"commit\": \"%s\", \"gpu\": \"%s\", \"complete\": %s, \"steps\": [", date, commit, gpu,
         (cut == "yes" ? "false" : "true")) > json
  for (i = 1; i <= steps; ++i) {
    name = order[i]
    printf "| %s | %s | %s | `%s` |\n", name, status[name], number(line[name], "seconds"), substr(result[name], 1, 400)
    printf("%s\n%s", (i > 1 ? "," : ""), line[name]) > json
  }
  print "\n]}" > json
}

END {
  if (mode == "curves") curves()
  else if (mode == "texts") texts()
  else report()
}
