# Prints AUC, interval, covariance and paired test of DeLong for every data set here, by pROC.
suppressMessages(library(pROC))
digits <- function(x) sprintf("%.15g", unname(x))
cat("set,name,value\n")
for (set in c("continuous", "tied", "tiny")) {
  d <- read.csv(paste0(set, ".csv"))
  a <- roc(d$y, d$a, levels = c(0, 1), direction = "<")
  b <- roc(d$y, d$b, levels = c(0, 1), direction = "<")
  test <- roc.test(a, b, paired = TRUE, method = "delong")
  values <- c(
    auc_a = as.numeric(auc(a)), low_a = ci.auc(a)[1], high_a = ci.auc(a)[3], var_a = var(a),
    auc_b = as.numeric(auc(b)), low_b = ci.auc(b)[1], high_b = ci.auc(b)[3], var_b = var(b),
    cov = cov(a, b), low = test$conf.int[1], high = test$conf.int[2], z = unname(test$statistic), p = test$p.value
  )
  for (name in names(values)) cat(set, ",", name, ",", digits(values[[name]]), "\n", sep = "")
}
